"""Real FFTs along the last axis."""

import jax.numpy as jnp
from jaxtyping import Array, Complex, Float


def rfft(x: Float[Array, "*B L"], n: int) -> Complex[Array, "*B F"]:
    return jnp.fft.rfft(x, n)


def irfft(spectrum: Complex[Array, "*B F"], n: int) -> Float[Array, "*B N"]:
    return jnp.fft.irfft(spectrum, n)
