r"""Long convolution over the devices of a mesh axis with some frequencies of every feature on each.

The outer stage of the butterfly is an all-to-all. Let step t = p + P j. Device p gets the steps of
its p, which is one exchange of real numbers, and transforms them over j: m points, m = n, or up to 2n with zeros behind
that never leave the device, where the convolution must not wrap. With N = P m and frequency k = k2 + m k1,

.. math:: X_k = \sum_p w_P^{k_1 p}\, w_N^{k_2 p} \sum_{j < m} w_m^{k_2 j}\, x_{p + P j}, \qquad w_N = e^{-2 \pi i / N}.

The inner sum is a real FFT, of which the columns k2 = 0 to m / 2 carry everything, for all k1: the other half of the
columns is their mirror image. A second exchange deals the columns out, after which P-point transforms over p are local,
and so is the product with the kernel's spectrum, which has come the same way. Nothing is put in order: the inverse goes
the way back, last stage first.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Inexact

from flashbutterfly_jax.functional.spectral import irfft, rfft
from flashbutterfly_jax.functional.xla import next_fast_even


def long_conv_by_frequencies(
    u: Float[Array, "*B D n"],
    kernel: Float[Array, "C D k"],
    reverse_kernel: Float[Array, "C D k"] | None,
    axis_name: str,
    circular: bool,
    output_dtype: jnp.dtype,
) -> Float[Array, "*B C D n"]:
    """The convolution, computed in the kernels' dtype.

    The local part of the sequence and of the taps; P divides n and k, and k <= n.
    """
    steps, taps = u.shape[-1], kernel.shape[-1]
    points = steps if circular else min(next_fast_even(steps + taps), 2 * steps)
    strided = _stride(u, axis_name).astype(kernel.dtype)
    placed = _pad(_stride(kernel, axis_name), after=points - taps)
    if reverse_kernel is not None:  # lag -m is index N - m
        placed = placed + _pad(_stride_backwards(reverse_kernel, axis_name), before=points - taps)
    # In one go, since two FFTs that are free to start at once can hang on a CPU.
    spectrum, kernel_spectrum = (_outer_stage(x, points, axis_name) for x in rfft(strided, placed, n=points))
    product = spectrum[..., None, :, :, :] * kernel_spectrum
    (y,) = irfft(_inverse_outer_stage(product, points, axis_name), n=points)
    return _unstride(y[..., :steps].astype(output_dtype), axis_name)


def _stride(x: Float[Array, "*rows n"], axis_name: str) -> Float[Array, "*rows n"]:
    """Steps p + P j on device p, from those of its block: step q n + i P + p is number q n / P + i of device p."""
    devices = jax.lax.axis_size(axis_name)
    x = jnp.swapaxes(x.reshape(*x.shape[:-1], -1, devices), -1, -2)
    return _exchange(x, axis_name).reshape(*x.shape[:-2], -1)


def _stride_backwards(x: Float[Array, "*rows n"], axis_name: str) -> Float[Array, "*rows n"]:
    """Likewise of x from its end: step L - 1 - (p + P j) is step P - 1 - p + P (n - 1 - j), so of device P - 1 - p."""
    devices = jax.lax.axis_size(axis_name)
    x = jnp.swapaxes(x.reshape(*x.shape[:-1], -1, devices), -1, -2)
    return jnp.flip(_exchange(jnp.flip(x, -2), axis_name).reshape(*x.shape[:-2], -1), -1)


def _unstride(x: Float[Array, "*rows n"], axis_name: str) -> Float[Array, "*rows n"]:
    """Back to blocks."""
    x = _exchange(x.reshape(*x.shape[:-1], jax.lax.axis_size(axis_name), -1), axis_name)
    return jnp.swapaxes(x, -1, -2).reshape(*x.shape[:-2], -1)


def _exchange(x: Inexact[Array, "*rows P n"], axis_name: str) -> Inexact[Array, "*rows P n"]:
    """Row q of axis P goes to device q, and row q of the result has come from it: its own inverse and transpose."""
    # On one axis: between two, jax 0.11.2 cannot transpose an all-to-all that is not tiled.
    return jax.lax.all_to_all(x, axis_name, split_axis=x.ndim - 2, concat_axis=x.ndim - 2)


def _outer_stage(x: Complex[Array, "*rows half"], points: int, axis_name: str) -> Complex[Array, "*rows P columns"]:
    """All k1 of this device's columns k2, from all columns of this device's p."""
    devices = jax.lax.axis_size(axis_name)
    x = x * _twiddles(points, axis_name, x.dtype)
    padding = -x.shape[-1] % devices  # columns of zeros, fewer than P
    x = _pad(x, after=padding).reshape(*x.shape[:-1], devices, -1)
    x = _exchange(x, axis_name)
    return jnp.einsum("kp,...pc->...kc", _dft(devices, x.dtype), x, precision="highest")


def _inverse_outer_stage(
    x: Complex[Array, "*rows P columns"], points: int, axis_name: str
) -> Complex[Array, "*rows half"]:
    devices = jax.lax.axis_size(axis_name)
    x = jnp.einsum("pk,...kc->...pc", jnp.conj(_dft(devices, x.dtype)) / devices, x, precision="highest")
    x = _exchange(x, axis_name)
    x = x.reshape(*x.shape[:-2], -1)[..., : points // 2 + 1]
    return x * jnp.conj(_twiddles(points, axis_name, x.dtype))


def _twiddles(points: int, axis_name: str, dtype: jnp.dtype) -> Complex[Array, " half"]:
    """w_N^(k2 p) of this device's p: at most half a turn, made on the device as all of them are as long as u."""
    devices, real = jax.lax.axis_size(axis_name), jnp.finfo(dtype).dtype
    turns = jnp.arange(points // 2 + 1, dtype=real) * jax.lax.axis_index(axis_name).astype(real)
    angle = turns * (-2 * math.pi / (devices * points))
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def _dft(points: int, dtype: jnp.dtype) -> Complex[Array, "{points} {points}"]:
    product = np.outer(np.arange(points), np.arange(points)) % points
    return jnp.asarray(np.exp(-2j * np.pi * product / points), dtype)


def _pad(x: Inexact[Array, "*rows _"], *, before: int = 0, after: int = 0) -> Inexact[Array, "*rows _"]:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((before, after),))
