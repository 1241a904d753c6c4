r"""A butterfly as a linear map of features, in place of a dense matrix.

.. math:: y = \operatorname{Re} V (s \circ U x)

with butterfly transforms U and V of n points and a complex diagonal s, all learned. At first U is the DFT, V its
inverse, and the map a circular convolution of the features with random taps; in training it becomes others. Where a
matrix has D D' numbers, this has 2 n of the diagonal and two transforms of 2 (n_1^2 + n_2^2 + ...).
"""

import functools
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from flashbutterfly_jax.functional.arguments import floating, shaped
from flashbutterfly_jax.functional.butterfly.blocks import Blocks, init_blocks, stage_blocks
from flashbutterfly_jax.functional.butterfly.plans import Plan, fast_plan
from flashbutterfly_jax.functional.butterfly.transform import forward, inverse
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Precision, checked_by_hand


def linear_plan(inputs: int, outputs: int, factors: tuple[int, ...] | None = None) -> Plan:
    """The factors given, or those of the cheapest transform; features are padded to its points, and cut from them.

    Raises:
      ValueError: the factors have fewer points than there are inputs or outputs.

    Example:
      >>> linear_plan(512, 128)
      Plan(factors=(32, 16))
    """
    least = max(inputs, outputs)
    if factors is None:
        return fast_plan(least)
    plan = Plan(factors)
    if plan.n < least:
        raise ValueError(
            f"factors must have a product of at least {least} for {inputs} inputs and {outputs} outputs; "
            f"got {factors}, whose product is {plan.n}."
        )
    return plan


def init_linear_blocks(
    key: PRNGKeyArray,
    plan: Plan,
    *,
    per_stage: bool = True,
    offset_scale: float | None = None,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Blocks]:
    """The blocks of U, ``input``, and of V, ``output``; see `init_blocks` for the arguments."""
    keys = jax.random.split(key)
    options = {"per_stage": per_stage, "offset_scale": offset_scale, "dtype": dtype}
    return {
        name: init_blocks(one_key, plan, inverse=name == "output", **options)  # type: ignore[arg-type]
        for name, one_key in zip(("input", "output"), keys, strict=True)
    }


def init_diagonal(
    key: PRNGKeyArray, shape: tuple[int, int], inputs: int, init: Callable | None = None, dtype: DTypeLike = jnp.float32
) -> Float[Array, "n 2"]:
    """The diagonal, ``(n, 2)``, of a map whose entries ``init`` could have drawn; None is N(0, 1 / inputs).

    The numbers are those of ``init`` times the root of n, which the circulant matrix of n taps divides by again.
    """
    init = jax.nn.initializers.normal(inputs**-0.5) if init is None else init
    return init(key, shape, dtype) * shape[0] ** 0.5


@checked_by_hand
def butterfly_linear(
    x: Annotated[ArrayLike, "*B D"],
    diagonal: Float[Array, "n 2"],
    blocks: dict[str, Blocks],
    outputs: int,
    *,
    plan: Plan,
    offset_scale: float | None = None,
    precision: Precision = None,
) -> Float[Array, "*B {outputs}"]:
    """Maps the last axis of x to so many outputs.

    Computes in float32, or in float64 where any argument is float64; the result has the dtype of x.

    Args:
      x: features on the last axis, at most plan.n.
      diagonal: s, its real and imaginary part.
      blocks: of `init_linear_blocks`.
      outputs: at most plan.n.
      plan: the factors.
      offset_scale: that of the blocks.
      precision: of the matrix products; None is the highest.

    Raises:
      ValueError: a shape or a dtype is wrong.

    Example:
      >>> plan = linear_plan(3, 4)
      >>> blocks = init_linear_blocks(jax.random.key(0), plan)
      >>> shift = jnp.stack([jnp.array([1.0, 0, -1, 0]), jnp.array([0.0, -1, 0, 1])], -1)  # exp(-2 pi i k / 4)
      >>> butterfly_linear(jnp.array([1.0, 2.0, 3.0]), shift, blocks, 4, plan=Plan((4,))).round()
      Array([0., 1., 2., 3.], dtype=float32)
    """
    x = floating("x", x)
    if x.ndim < 1 or x.shape[-1] > plan.n:
        raise ValueError(f"x must have shape (*B, D) with D <= {plan.n} for {plan}; got shape {x.shape}.")
    if outputs > plan.n:
        raise ValueError(f"outputs must be at most {plan.n} for {plan}; got {outputs}.")
    shaped("diagonal", diagonal, (plan.n, 2), of="the plan's points in real and imaginary parts")
    blocks = jax.tree.map(functools.partial(floating, "blocks"), blocks)
    return _apply(x, jnp.asarray(diagonal), blocks, outputs, plan, offset_scale, precision)


@functools.partial(jax.jit, static_argnames=("outputs", "plan", "offset_scale", "precision"))
def _apply(
    x: Float[Array, "*B D"],
    diagonal: Float[Array, "n 2"],
    blocks: dict[str, Blocks],
    outputs: int,
    plan: Plan,
    offset_scale: float | None,
    precision: Precision,
) -> Float[Array, "..."]:
    arrays = (x, diagonal, blocks)
    dtype = jnp.float64 if any(a.dtype == jnp.float64 for a in jax.tree.leaves(arrays)) else jnp.float32
    rows, pairs, blocks = jax.tree.map(lambda a: a.astype(dtype), arrays)
    rows = jnp.pad(rows, [(0, 0)] * (x.ndim - 1) + [(0, plan.n - x.shape[-1])])
    there, back = (
        stage_blocks(blocks[name], plan, offset_scale=offset_scale, inverse=name == "output")
        for name in ("input", "output")
    )
    spectrum = forward(rows, plan, blocks=there, precision=precision)
    spectrum = spectrum * jax.lax.complex(pairs[:, 0], pairs[:, 1]).reshape(plan.factors)
    return inverse(spectrum, plan, real=True, blocks=back, precision=precision)[..., :outputs].astype(x.dtype)
