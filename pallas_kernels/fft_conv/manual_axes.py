"""Inside `jax.shard_map` the type of an array says over which mesh axes it varies; kernels know nothing of that."""

import jax


def varying_alike(*operands: jax.Array | None) -> list:
    """The operands, all varying over the axes over which one of them does; None stays None.

    A kernel's results seem to vary over none, and `custom_vjp` wants cotangents that vary like what they belong to. The
    transpose of what is done here sums a cotangent over the devices that share the operand.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b, c = varying_alike(jnp.ones(2), jnp.ones(3), None)
      >>> c is None
      True
    """
    axes = frozenset().union(*(axes_of(x) for x in operands if x is not None))
    return [x if x is None else varying_over(axes, x) for x in operands]


def axes_of(x: jax.Array) -> frozenset:
    """Those over which an array varies, none outside `jax.shard_map` or with its ``check_vma=False``."""
    return jax.typeof(x).manual_axis_type.varying


def varying_over(axes: frozenset, x: jax.Array) -> jax.Array:
    """The array, varying over these axes too."""
    missing = tuple(axes - axes_of(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
