"""Taps of a circular convolution."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def circular_taps(
    kernel: Float[Array, "C D K"], reverse_kernel: Float[Array, "C D K"] | None, length: int
) -> Float[Array, "C D {length}"]:
    """The taps of lags 0 to length - 1 to which all others come down: lags agree modulo the length."""
    taps = _fold(kernel, length)
    if reverse_kernel is not None:  # lag -m is lag length - m
        taps = taps + jnp.flip(_fold(reverse_kernel, length), -1)
    return taps


def _fold(kernel, length):
    padded = jnp.pad(kernel, ((0, 0), (0, 0), (0, -kernel.shape[-1] % length)))
    return padded.reshape(*kernel.shape[:-1], -1, length).sum(-2)
