"""The fixed convolution by the passes of learned blocks: a right-angle transform in three, at lengths that need none.

`long_conv` convolves up to 32,768 steps in one launch, and back in one or three, by blocks of 4096 steps whose spectra
meet on chip. That rests on the taps' being causal and on the blocks' being Fourier's; learned ones have no such way.
This takes the three passes that learned ones have, with the kernels that `long_conv` has beyond 32,768 steps.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv import three_pass
from pallas_kernels.fft_conv.config import BLOCK
from pallas_kernels.fft_conv.outer_plan import outer_plan


@jax.custom_vjp
def fixed_in_three_passes(u: jax.Array, taps: jax.Array) -> jax.Array:
    """The causal convolution of u `(B, D, L)` in 16 bits with taps `(D, L)` in float32, on one Hopper GPU.

    L is a power of two from 8192 to 4,194,304. It has derivatives by both, once. 8192 steps, whose four rows a copy of
    eight takes, were run in the interpreter alone.
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
    plan = outer_plan(length // BLOCK, batch, both_ways=True)
    shared = {"plan": plan, "shift": jnp.array([31], jnp.int32), "before": False}
    return u.reshape(batch, 1, features, -1, BLOCK), taps.reshape(features, 1, -1, BLOCK), shared
