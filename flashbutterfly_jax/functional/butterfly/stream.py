"""The causal form of the learned butterfly step by step: what a block brings to the later ones is known when it ends.

A step within a block of P is a sum over at most P inputs; the last one of a block transforms it, for all steps that its
taps reach, so that a step takes O(P + K log P) operations on average.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flashbutterfly_jax.functional.butterfly.blocks import Blocks
from flashbutterfly_jax.functional.butterfly.learned import (
    LearnedButterfly,
    _across,
    _cut,
    _Learned,
    _pad,
    learned_long_conv,
)
from flashbutterfly_jax.typing import DTypeLike


class LearnedState(NamedTuple):
    """What is remembered of the steps until now."""

    block: Float[Array, "*B D P"]
    """Inputs of the block that is not over, zero from the next step on."""
    future: Float[Array, "*B D S"]
    """What the blocks that are over bring to each step."""
    position: Int[Array, ""]
    """Steps until now."""


def init_state(
    butterfly: LearnedButterfly, rows: tuple[int, ...], taps: int, max_length: int, dtype: DTypeLike = jnp.float32
) -> LearnedState:
    """The state before the first step.

    Args:
      butterfly: of the causal form.
      rows: ``(*B, D)``.
      taps: K of the kernel.
      max_length: steps that there is place for.
      dtype: of the state.

    Raises:
      ValueError: the form looks ahead.
    """
    if not butterfly.causal:
        raise ValueError(f"butterfly must be of the causal form to go on step by step; got {butterfly.form!r}.")
    points = butterfly.plan(taps).n
    places = -(-max_length // points) * points + _reach(points, taps)
    return LearnedState(jnp.zeros((*rows, points), dtype), jnp.zeros((*rows, places), dtype), jnp.int32(0))


def prefill(
    u: Float[Array, "*B D L"],
    state: LearnedState,
    kernel: Float[Array, "D K"],
    skip: Float[Array, "D"],
    blocks: dict[str, Blocks],
    *,
    butterfly: LearnedButterfly,
) -> tuple[Float[Array, "*B D L"], LearnedState]:
    """The first L steps at once, from the state before them, and the state after them."""
    points = state.block.shape[-1]
    y = learned_long_conv(u, kernel, skip, blocks=blocks, butterfly=butterfly)
    over = u.shape[-1] // points * points
    x, future = u.astype(state.future.dtype), state.future
    if over:
        future = _later(_pad(x[..., :over], future.shape[-1]), kernel, blocks, butterfly)
    return y, LearnedState(_pad(x[..., over:], points), future, jnp.int32(u.shape[-1]))


def step(
    u: Float[Array, "*B D"],
    state: LearnedState,
    kernel: Float[Array, "D K"],
    skip: Float[Array, "D"],
    blocks: dict[str, Blocks],
    *,
    butterfly: LearnedButterfly,
) -> tuple[Float[Array, "*B D"], LearnedState]:
    """The next step, and the state after it."""
    points = state.block.shape[-1]
    dtype = state.future.dtype
    x, t = u.astype(dtype), state.position % points
    block = lax.dynamic_update_index_in_dim(state.block, x, t, -1)
    first = _pad(kernel[..., :points].astype(dtype), points)
    within = (jnp.roll(jnp.flip(first, -1), t + 1, -1) * block).sum(-1)  # tap t - s meets input s
    earlier = lax.dynamic_index_in_dim(state.future, state.position, -1, keepdims=False)
    y = within + earlier + skip.astype(dtype) * x

    def begin_next(block, future):
        reach = _reach(points, kernel.shape[-1])
        start = state.position + 1 - points
        brought = _later(_pad(block, reach), kernel, blocks, butterfly)
        there = lax.dynamic_slice_in_dim(future, start, reach, -1)
        return jnp.zeros_like(block), lax.dynamic_update_slice_in_dim(future, there + brought, start, -1)

    block, future = lax.cond(t == points - 1, begin_next, lambda *state: state, block, state.future)
    return y.astype(u.dtype), LearnedState(block, future, state.position + 1)


def _reach(points: int, taps: int) -> int:
    """Steps from the first of a block to the end of the last block that it brings something to."""
    return (-(-taps // points) + 1) * points


def _later(
    u: Float[Array, "*B D S"], kernel: Float[Array, "D K"], blocks: dict[str, Blocks], butterfly: LearnedButterfly
) -> Float[Array, "*B D S"]:
    """What each block gets from those before it."""
    plan = butterfly.plan(kernel.shape[-1])
    kernel, blocks = jax.tree.map(lambda x: x.astype(u.dtype), (kernel, blocks))
    learned = _Learned(plan, butterfly, blocks, None)
    y = learned.back(_across(learned, _cut(u, plan.n), _cut(kernel, plan.n)), inner=1)
    return y.reshape(u.shape)
