"""`learned_long_fft_conv`: padding, scales and derivatives around `learned_three_pass`."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from pallas_kernels.fft_conv import learned_three_pass
from pallas_kernels.fft_conv.config import BLOCK
from pallas_kernels.fft_conv.learned_operation import Operation, on_gpu
from pallas_kernels.fft_conv.learned_three_pass import Plan, Transform
from pallas_kernels.fft_conv.outer_plan import DIRECT_ROWS
from pallas_kernels.fft_conv.platform import varying_alike

FEWEST_ROWS, MOST_ROWS = 2, DIRECT_ROWS
"""Of 4096 steps."""


class LongBlocks(NamedTuple):
    """Complex blocks of one layer, the shift of the right angle and the 1/n of the way back included."""

    f0: Complex[Array, "m m"]
    """`[k0, n0]`."""
    f1: Complex[Array, "64 64"]
    """`[k1, n1]`."""
    f2: Complex[Array, "64 64"]
    """`[n2, k2]`."""
    v2: Complex[Array, "64 64"]
    """`[k2, n2]`."""
    v1: Complex[Array, "64 64"]
    """`[n1, k1]`."""
    v0: Complex[Array, "m m"]
    """`[n0, k0]`."""
    kernel_f0: Complex[Array, "m m"]
    """Of the transform of the taps, `[k0, n0]`."""
    kernel_f1: Complex[Array, "64 64"]
    """`[k1, n1]`."""
    kernel_f2: Complex[Array, "64 64"]
    """`[n2, k2]`."""


def learned_long_fft_conv(
    u: Float[Array, "B D L"], taps: Float[Array, "D K"], blocks: LongBlocks, grid: int = 132
) -> Float[Array, "B D L"]:
    """The learned right-angle convolution of 4096 m points, m from 2 to 128, on Hopper GPUs, in three passes.

    `learned_three_pass` has the algebra; products are of 16-bit numbers with float32 sums. It has derivatives by u, the
    taps and every block, once; they save the arguments and the taps' spectra, and compute everything else again.
    Intermediates are of twice the size of u, two of them at once forward and four backward. Sequences are padded to
    whole rows of 4096 steps, and to multiples of eight rows where too few are at hand to be taken together. Under a
    sharded jit each device works on its own rows and features.

    Args:
      u: bfloat16 or float16; L at most 4096 m.
      taps: of lags from 0, K at most 4096 m.
      blocks: of all transforms.
      grid: blocks of threads, at most; one for each multiprocessor is best.

    Raises:
      NotImplementedError: for sizes or dtypes that no kernel has, and on being run without a CUDA device.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> blocks = LongBlocks(*(jnp.ones((n, n), jnp.complex64) for n in (8, 64, 64, 64, 64, 8, 8, 64, 64)))
      >>> u, taps = jax.ShapeDtypeStruct((2, 3, 30000), jnp.bfloat16), jax.ShapeDtypeStruct((3, 32768), jnp.float32)
      >>> jax.eval_shape(learned_long_fft_conv, u, taps, blocks)
      ShapeDtypeStruct(shape=(2, 3, 30000), dtype=bfloat16)
    """
    m, length = blocks.f0.shape[0], u.shape[-1]
    if not FEWEST_ROWS <= m <= MOST_ROWS:
        raise NotImplementedError(
            f"the learned kernels take from {FEWEST_ROWS} to {MOST_ROWS} rows of {BLOCK} steps; got {m}."
        )
    if u.dtype not in (jnp.bfloat16, jnp.float16) or max(length, taps.shape[-1]) > m * BLOCK:
        raise NotImplementedError(
            f"the learned kernels take bfloat16 or float16 sequences and taps of at most {m * BLOCK} steps; got "
            f"{u.dtype} of {length} with {taps.shape[-1]} taps."
        )
    plan = Plan(m, grid)
    # Both parts of each row of each transform are kept in between.
    most = 2**30 // (plan.rows * BLOCK)
    if math.prod(u.shape[:-1]) >= most:
        raise NotImplementedError(
            f"the learned kernels of {m * BLOCK} points take fewer than {most} sequences at once, to address fewer "
            f"than 2**31 numbers; got u of shape {u.shape}. Divide the batch."
        )
    there = plan.transform(blocks.f0, blocks.f1, blocks.f2)
    back = plan.transform(*map(_adjoint, (blocks.v0, blocks.v1, blocks.v2)))
    of_taps = plan.transform(blocks.kernel_f0, blocks.kernel_f1, blocks.kernel_f2)
    operands = _as_rows(u), _as_rows(taps.astype(jnp.float32)), there, back, of_taps
    operands = jax.tree.unflatten(jax.tree.structure(operands), varying_alike(*jax.tree.leaves(operands)))
    return _conv(plan, *operands).reshape(*u.shape[:2], -1)[..., :length]


def _as_rows(x):
    """`(..., L)` as `(..., rows, 4096)`."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)])
    return padded.reshape(*x.shape[:-1], -1, BLOCK)


def _adjoint(block):
    """Of a block on the way back, which holds the 1/n of its n points, without that."""
    return block.shape[0] * block.conj().T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(plan: Plan, u, taps, of_u: Transform, of_g: Transform, of_taps: Transform):
    """In the kernels' shapes: u and the result `(B, D, rows, 4096)`, taps `(D, rows, 4096)`."""
    return _conv_fwd(plan, u, taps, of_u, of_g, of_taps)[0]


def _conv_fwd(plan, u, taps, *transforms):
    y, spectra = on_gpu(_forward_op, plan, u, taps, *jax.tree.leaves(transforms))
    return y, (u, taps, spectra, transforms)


def _conv_bwd(plan, saved, g):
    u, taps, spectra, transforms = saved
    d_u, d_taps, *d_blocks = on_gpu(_backward_op, plan, u, g, taps, spectra, *jax.tree.leaves(transforms))
    return d_u, d_taps, *_transforms(d_blocks)


_conv.defvjp(_conv_fwd, _conv_bwd)


def _transforms(blocks):
    return [Transform(*blocks[at : at + 3]) for at in range(0, 9, 3)]


def _run_forward(u, taps, *rest):
    *blocks, shift, plan = rest
    of_u, of_g, of_taps = _transforms(blocks)
    return learned_three_pass.forward(u, taps, of_u, of_g, of_taps, shift, plan)


def _run_backward(u, g, taps, spectra, *rest):
    *blocks, shift, plan = rest
    of_u, of_g, of_taps = _transforms(blocks)
    cotangents = learned_three_pass.backward(u, g, taps, spectra, of_u, of_g, of_taps, shift, plan)
    return tuple(jax.tree.leaves(cotangents))


def _axes_of_blocks():
    """Names for the axes of all blocks, `outer`, `first` and `second` of each transform."""
    for transform in ("u", "g", "k"):
        for block, axes in (("outer", 3), ("first", 4), ("second", 3)):
            yield " ".join(f"{transform}_{block}_{axis}" for axis in range(axes))


_OF_BLOCKS = tuple(_axes_of_blocks())
_SPECTRA = "d s0 s1 s2 s3"
_forward_op = Operation(_run_forward, ["b d l n", "d k kn", *_OF_BLOCKS], ["b d l n", _SPECTRA])
_backward_op = Operation(
    _run_backward,
    ["b d l n", "b d l n", "d k kn", _SPECTRA, *_OF_BLOCKS],
    ["b d l n", "d k kn", *_OF_BLOCKS],
    sums=True,
)
