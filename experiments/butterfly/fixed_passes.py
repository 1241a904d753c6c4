"""The fixed convolution by the passes of learned blocks: a right-angle transform in three, at lengths that need none.

`long_conv` convolves up to 32,768 steps in one launch, by blocks of 4096 steps whose spectra meet on chip. That rests
on the taps' being causal and on the blocks' being Fourier's; learned ones have no such way. This has the passes that
learned ones have, with the kernels that `long_conv` takes beyond 32,768 steps, and stages that take short sequences
together, as the learned ones do: without those it would move up to four times as many rows.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv import inner_sm90, learned_three_pass, three_pass
from pallas_kernels.fft_conv.config import BLOCK
from pallas_kernels.fft_conv.lowering import lowered_once
from pallas_kernels.fft_conv.outer_plan import OuterPlan, outer_plan, split_matrix


@jax.custom_vjp
def fixed_in_three_passes(u: jax.Array, taps: jax.Array) -> jax.Array:
    """The causal convolution of u `(B, D, L)` in 16 bits with taps `(D, L)` in float32, on one Hopper GPU.

    L is a multiple of 4096, at most 524,288. It has derivatives by both, once.
    """
    return _forward(u, taps)[0]


def _forward(u, taps):
    plan, shift = _plan(u), _shift()
    spectra = _spectra(u, taps, plan, shift)
    z = _split(u, plan)
    kernel = lowered_once(inner_sm90.forward, _shapes(z, plan))
    return _join(kernel(z, spectra, *three_pass.inner_tables(plan, u.dtype), shift), u, plan), (u, taps)


def _backward(saved, g):
    u, taps = saved
    plan, shift = _plan(u), _shift()
    z, h = _split(u, plan), _split(g, plan)
    kernel = lowered_once(inner_sm90.backward, _shapes(z, plan, warpgroups=2))
    w, d_spectra = kernel(z, h, _spectra(u, taps, plan, shift), *three_pass.inner_tables(plan, u.dtype), shift)
    d_taps = three_pass.tap_cotangent(d_spectra.sum(0), u.shape[-1] // BLOCK, plan, shift, before=False)
    return _join(w, u, plan), d_taps.reshape(taps.shape)


fixed_in_three_passes.defvjp(_forward, _backward)


def _plan(u) -> OuterPlan:
    return outer_plan(u.shape[-1] // BLOCK)


def _shift():
    """By which the kernels make their opaque zeros."""
    return jnp.array([31], jnp.int32)


def _spectra(u, taps, plan, shift):
    return three_pass.tap_spectra(taps.reshape(len(taps), 1, -1, BLOCK), plan, u.dtype, shift, before=False)


def _shapes(z, plan, **options):
    return inner_sm90.Shapes(z.shape[0], 1, z.shape[2], plan.rows, z.dtype, **options)


def _split(x, plan):
    return learned_three_pass._split(x.reshape(*x.shape[:2], -1, BLOCK), jnp.stack(split_matrix(plan)))


def _join(w, like, plan):
    return learned_three_pass._join(w, jnp.stack(split_matrix(plan)), like.shape[-1] // BLOCK).reshape(like.shape)
