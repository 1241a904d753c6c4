"""The fixed convolution by the passes of learned blocks: a right-angle transform in three, at lengths that need none.

`long_conv` convolves up to 32,768 steps in one launch, and back in one or three, by blocks of 4096 steps whose spectra
meet on chip. That rests on the taps' being causal and on the blocks' being Fourier's; learned ones have no such way.
This takes the three passes that learned ones have, with the kernels that `long_conv` has beyond 32,768 steps.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv import three_pass
from pallas_kernels.fft_conv.config import BLOCK
from pallas_kernels.fft_conv.outer_plan import LONGEST, outer_plan


@jax.custom_vjp
def fixed_in_three_passes(u: jax.Array, taps: jax.Array) -> jax.Array:
    """The causal convolution of u `(B, D, L)` in 16 bits with taps `(D, L)` in float32, on one Hopper GPU.

    L is a power of two from 8192 to 4,194,304. It has derivatives by both, once. Of 8192 steps, whose four rows a copy
    of eight takes, the values were compared in the interpreter alone.

    Raises:
      NotImplementedError: for other lengths, shapes or dtypes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> u, taps = jax.ShapeDtypeStruct((2, 3, 8192), jnp.bfloat16), jax.ShapeDtypeStruct((3, 8192), jnp.float32)
      >>> jax.eval_shape(fixed_in_three_passes, u, taps)
      ShapeDtypeStruct(shape=(2, 3, 8192), dtype=bfloat16)
    """
    x, taps, shared = _operands(u, taps)
    return three_pass.forward(x, None, None, taps, **shared).reshape(u.shape)


def _forward(u, taps):
    return fixed_in_three_passes(u, taps), (u, taps)


def _backward(saved, g):
    u, taps = saved
    x, blocks, shared = _operands(u, taps)
    h = g.reshape(x.shape)
    d_x, _, d_taps = three_pass.backward(x, None, None, h, blocks, **shared)
    return d_x.reshape(u.shape), d_taps.reshape(taps.shape)


fixed_in_three_passes.defvjp(_forward, _backward)


def _operands(u, taps):
    """Sequences and taps in blocks, and all else that the passes take."""
    batch, features, length = u.shape
    if length.bit_count() != 1 or not 2 * BLOCK <= length <= LONGEST:
        raise NotImplementedError(
            f"three passes are timed at powers of two from {2 * BLOCK} to {LONGEST} steps; got u of {length}. "
            "long_conv takes any length."
        )
    if u.dtype not in (jnp.bfloat16, jnp.float16) or taps.shape != (features, length):
        raise NotImplementedError(
            f"u must be bfloat16 or float16 and the taps of shape {(features, length)}, one for each step; got u of "
            f"{u.dtype} and taps of shape {taps.shape}."
        )
    plan = outer_plan(length // BLOCK, batch, both_ways=True)
    shared = {"plan": plan, "shift": jnp.array([31], jnp.int32), "before": False}
    return u.reshape(batch, 1, features, -1, BLOCK), taps.reshape(features, 1, -1, BLOCK), shared
