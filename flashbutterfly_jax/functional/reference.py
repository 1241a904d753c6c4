"""What a long convolution is, in the fewest lines: every other path is tested against this one."""

import jax.numpy as jnp


def long_conv_reference(
    u, kernel, skip, *, reverse_kernel=None, circular=False, pre_gate=None, post_gate=None, precision=None
):
    """A `Backend` that puts the tap of lag m at index m modulo N, N = L if circular and 2L if not."""
    length, taps = u.shape[-1], kernel.shape[-1]
    n = length if circular else 2 * length
    lags = jnp.arange(taps if circular else min(taps, length))  # a tap further back than L - 1 reaches nothing
    filters = jnp.zeros((*kernel.shape[:-1], n), kernel.dtype).at[..., lags % n].add(kernel[..., : lags.size])
    if reverse_kernel is not None:
        lags = lags + 1 if circular else lags[: length - 1] + 1
        filters = filters.at[..., -lags % n].add(reverse_kernel[..., : lags.size])
    gated = u if pre_gate is None else pre_gate * u
    gated = gated[..., None, :, :]
    y = jnp.fft.irfft(jnp.fft.rfft(gated, n) * jnp.fft.rfft(filters), n)[..., :length]
    if skip is not None:
        y = y + skip[..., None] * gated
    return (y if post_gate is None else post_gate * y).astype(u.dtype)
