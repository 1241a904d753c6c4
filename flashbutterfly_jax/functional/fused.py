"""Long convolution by one of the fused kernels of `pallas_kernels`, which take one batch axis and both sides' taps."""

import math
import pkgutil

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flashbutterfly_jax.functional.origin import check_pallas_kernels
from flashbutterfly_jax.functional.taps import both_sides


def long_conv_fused(
    name: str,
    u: Float[Array, "*B D L"],
    kernel: Float[Array, "C D K"],
    skip: Float[Array, "C D"] | None,
    *,
    reverse_kernel: Float[Array, "C D K"] | None,
    circular: bool,
    pre_gate: Float[Array, "*B D L"] | None,
    post_gate: Float[Array, "*B #C D L"] | None,
    precision: jax.lax.Precision | None,
) -> Float[Array, "*B C D L"]:
    """A `Backend`, given ``module:function`` of the kernel, which convolves with taps on both sides of lag 0."""
    if u.dtype == jnp.float32 and precision not in (None, jax.lax.Precision.DEFAULT):
        raise NotImplementedError(
            f"the fused kernel multiplies 16-bit numbers; got precision {precision} for a float32 u."
        )
    check_pallas_kernels()
    fft_conv = pkgutil.resolve_name(name)  # on first use: importing Pallas takes a second that "xla" need not pay
    forward, reverse = both_sides(kernel, skip, reverse_kernel, u.shape[-1], circular=circular)
    batch = u.shape[:-2]
    rows = math.prod(batch)
    y = fft_conv(
        u.reshape(rows, *u.shape[-2:]),
        forward,
        reverse,
        pre_gate=None if pre_gate is None else pre_gate.reshape(rows, *u.shape[-2:]),
        post_gate=None if post_gate is None else post_gate.reshape(rows, *post_gate.shape[-3:]),
    )
    return y.reshape(*batch, *y.shape[1:])
