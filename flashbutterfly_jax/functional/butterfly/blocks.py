"""Learned blocks: what a butterfly transform multiplies by, as parameters, in place of the dense DFT blocks.

A complex block is stored as pairs of real numbers, ``[H, n, n, 2]`` with the real part first, for H = 1 copy that all
features share or one for each feature. Twiddles are never learned.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from flashbutterfly_jax.functional.butterfly.plans import Plan
from flashbutterfly_jax.functional.butterfly.transform import dft_block
from flashbutterfly_jax.typing import DTypeLike

type Blocks = dict[str, Float[Array, "H _ _ 2"]]
"""By name: ``size_n`` for every stage of that size, or ``stage_i`` for stage i alone."""


def block_shapes(plan: Plan, *, copies: int = 1, per_stage: bool = False) -> dict[str, tuple[int, int, int, int]]:
    """The name and the shape of each block of a transform, in the order of the stages.

    Example:
      >>> block_shapes(Plan((16, 16, 4)))
      {'size_16': (1, 16, 16, 2), 'size_4': (1, 4, 4, 2)}
      >>> sum(2 * n * n for _, n, _, _ in block_shapes(Plan((16, 8, 4, 2))).values())  # reals of each copy
      680
    """
    return {_name(i, f, per_stage): (copies, f, f, 2) for i, f in enumerate(plan.factors)}


def init_blocks(
    key: PRNGKeyArray,
    plan: Plan,
    *,
    copies: int = 1,
    per_stage: bool = False,
    offset_scale: float | None = None,
    inverse: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> Blocks:
    """Blocks that make the transform the discrete Fourier transform, exactly or nearly.

    Args:
      key: used only where offsets are random.
      plan: the factors.
      copies: H; 1 shares the blocks over the features.
      per_stage: a block for each stage; otherwise one for each size, as in the paper's code.
      offset_scale: None learns the blocks themselves; a number learns what is added to the DFT, which starts as
        N(0, offset_scale^2).
      inverse: for the transform back: e^(+2 pi i k t / n) without the 1/n, which `stage_blocks` supplies.
      dtype: of the real numbers.

    Example:
      >>> init_blocks(jax.random.key(0), Plan((2,)))["size_2"][0, ..., 0].tolist()  # its real part
      [[1.0, 1.0], [1.0, -1.0]]
    """
    shapes = block_shapes(plan, copies=copies, per_stage=per_stage)
    if offset_scale is not None:
        keys = jax.random.split(key, len(shapes))
        normal = (jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes.values(), strict=True))
        return {name: offset_scale * offset for name, offset in zip(shapes, normal, strict=True)}
    return {name: jnp.asarray(np.broadcast_to(_pairs(_exact(s[1], inverse)), s), dtype) for name, s in shapes.items()}


def stage_blocks(
    blocks: Blocks,
    plan: Plan,
    shift: float = 0.0,
    *,
    offset_scale: float | None = None,
    inverse: bool = False,
) -> list[Complex[Array, "*H n n"]]:
    """The complex block of each stage, as `forward` and `inverse` take them: one copy without its axis, or one of each.

    A shift is a fixed factor: it multiplies the columns of the first block, or the rows of its inverse. So one stored
    block serves the first stage and the later ones.

    Args:
      blocks: of `init_blocks`, with this plan, offset_scale and inverse.
      plan: the factors.
      shift: of the transform.
      offset_scale: see `init_blocks`.
      inverse: see `init_blocks`.

    Raises:
      ValueError: a block is missing or of another shape.

    Example:
      >>> blocks = init_blocks(jax.random.key(0), Plan((4, 2)))
      >>> [block.shape for block in stage_blocks(blocks, Plan((4, 2)), 0.25)]
      [(4, 4), (2, 2)]
    """
    per_stage = any(name.startswith("stage_") for name in blocks)
    matrices = []
    for i, f in enumerate(plan.factors):
        name = _name(i, f, per_stage)
        if name not in blocks or blocks[name].shape[-3:] != (f, f, 2) or blocks[name].ndim != 4:
            shapes = {name: value.shape for name, value in blocks.items()}
            raise ValueError(f"blocks must hold {name!r} of shape (H, {f}, {f}, 2) for {plan}; got {shapes}.")
        pairs = blocks[name]
        matrix = jax.lax.complex(pairs[..., 0], pairs[..., 1])
        if offset_scale is not None:
            matrix = matrix + jnp.asarray(_exact(f, inverse), matrix.dtype)
        if i == 0 and shift:
            turn = dft_block(f, shift)[0]
            matrix = matrix * jnp.asarray(turn.conj()[:, None] if inverse else turn, matrix.dtype)
        if inverse:
            matrix = matrix / f
        matrices.append(matrix[0] if matrix.shape[0] == 1 else matrix)
    return matrices


def _name(stage: int, factor: int, per_stage: bool) -> str:
    return f"stage_{stage}" if per_stage else f"size_{factor}"


def _exact(n: int, inverse: bool) -> Complex[np.ndarray, "{n} {n}"]:
    return dft_block(n).conj() if inverse else dft_block(n)


def _pairs(z: Complex[np.ndarray, "n n"]) -> Float[np.ndarray, "n n 2"]:
    return np.stack([z.real, z.imag], -1)
