"""Taps of a circular convolution, and those on both sides of lag 0 to which every mode comes down."""

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


def both_sides(
    kernel: Float[Array, "C D K"],
    skip: Float[Array, "C D"] | None,
    reverse_kernel: Float[Array, "C D K"] | None,
    length: int,
    *,
    circular: bool,
) -> tuple[Float[Array, "C D _"], Float[Array, "C D _"] | None]:
    """Taps at lags from 0, and at lags -1, -2, .. if there are any, cut off where they reach nothing.

    A skip is more of tap 0, and a circular kernel is its own reverse, seen from the other side.
    """
    forward, reverse = kernel[..., :length], reverse_kernel
    if circular:
        forward = circular_taps(kernel, reverse_kernel, length)
        reverse = jnp.flip(forward[..., 1:], -1)
    elif reverse is not None:
        reverse = reverse[..., : length - 1]
    return forward if skip is None else forward.at[..., 0].add(skip), reverse


def _fold(kernel, length):
    padded = jnp.pad(kernel, ((0, 0), (0, 0), (0, -kernel.shape[-1] % length)))
    return padded.reshape(*kernel.shape[:-1], -1, length).sum(-2)
