"""Long convolution by real FFTs that XLA runs: works on every platform, under every transformation."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flashbutterfly_jax.functional.spectral import irfft, rfft


@functools.partial(jax.jit, static_argnames=("circular", "precision"))
def long_conv_xla(
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
    """The `Backend` behind ``implementation="xla"``.

    Computes in float32, or in float64 where any argument is float64. Three transforms whatever the mode: of u, which
    the channels share, and of the kernel in one go, and one back. ``precision`` is for matrix units, not for FFTs.
    """
    del precision
    length, output_dtype = u.shape[-1], u.dtype
    arguments = (u, kernel, skip, reverse_kernel, pre_gate, post_gate)
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in jax.tree.leaves(arguments)) else jnp.float32
    u, kernel, skip, reverse_kernel, pre_gate, post_gate = jax.tree.map(lambda x: x.astype(dtype), arguments)

    n = _fft_size(length, kernel.shape[-1], bidirectional=reverse_kernel is not None, circular=circular)
    gated = u if pre_gate is None else u * pre_gate
    placed = _place_taps(kernel, reverse_kernel, skip, length, n, circular)
    spectrum, kernel_spectrum = rfft(gated, placed, n=n)
    (y,) = irfft(spectrum[..., None, :, :] * kernel_spectrum, n=n)
    y = y[..., :length]
    return (y if post_gate is None else y * post_gate).astype(output_dtype)


def _place_taps(kernel, reverse_kernel, skip, length, n, circular):
    """One length-n kernel that holds the tap of lag m at index m modulo n, the skip at lag 0 included."""
    if circular:
        kernel, reverse_kernel = _fold(kernel, n), _fold(reverse_kernel, n)
    else:  # lags beyond the sequence reach nothing: keeping their taps would wrap them into the past
        kernel = kernel[..., :length]
        reverse_kernel = None if reverse_kernel is None else reverse_kernel[..., : length - 1]
    placed = jnp.pad(kernel, ((0, 0), (0, 0), (0, n - kernel.shape[-1])))
    if reverse_kernel is not None:
        flipped = jnp.flip(reverse_kernel, -1)  # lag -1 is the last index
        placed += jnp.pad(flipped, ((0, 0), (0, 0), (n - flipped.shape[-1], 0)))
    if skip is not None:
        placed += jnp.pad(skip[..., None], ((0, 0), (0, 0), (0, n - 1)))
    return placed


def _fold(kernel, length):
    """Sum of the taps whose lags agree modulo the length."""
    if kernel is None or kernel.shape[-1] <= length:
        return kernel
    padded = jnp.pad(kernel, ((0, 0), (0, 0), (0, -kernel.shape[-1] % length)))
    return padded.reshape(*kernel.shape[:-1], -1, length).sum(-2)


def _fft_size(length: int, taps: int, *, bidirectional: bool, circular: bool) -> int:
    """The smallest fast size at which no tap wraps into the part of the result that is kept."""
    if circular:
        return length
    reach = min(taps, length) - 1
    if bidirectional:
        reach = max(reach, min(taps, length - 1))
    return next_fast_even(length + reach)


@functools.cache
def next_fast_even(n: int) -> int:
    """The smallest even 7-smooth integer that is not below n."""
    candidate = n + n % 2
    while not _is_seven_smooth(candidate):
        candidate += 2
    return candidate


def _is_seven_smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n == 1
