"""Operations that exist for one platform, where they may be lowered for any and run inside `jax.shard_map`.

There the type of an array says over which mesh axes it varies, of which kernels know nothing.
"""

from collections.abc import Callable
from typing import Any

import jax


def on_cuda(run: Callable[..., Any], refuse: Callable[..., jax.Array], *operands: jax.Array) -> Any:
    """``run(*operands)`` where it is lowered for CUDA, and elsewhere what ``refuse(result, *operands)`` becomes there.

    Args:
      run: gives arrays, which vary over the axes over which an operand does.
      refuse: binds a primitive whose lowering raises; `result` is a `jax.ShapeDtypeStruct` of what run would give.
      operands: of both.
    """
    operands = tuple(varying_alike(*operands))
    axes = axes_of(operands[0])

    def varying(*operands: jax.Array) -> Any:
        return jax.tree.map(lambda result: varying_over(axes, result), run(*operands))

    results = jax.eval_shape(varying, *operands)
    return jax.lax.platform_dependent(
        *operands, cuda=varying, default=lambda *x: jax.tree.map(lambda result: refuse(result, *x), results)
    )


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
