"""What the kernels keep in shared memory: DFT blocks, twiddles and the taps' spectrum, in the kernels' order.

The transform is the right-angle one: with n points, n >= L,

    U[k] = sum_t u[t] exp(-2 pi i (k + 1/4) t / n),      t = n1 n2' + n2,  k = k1 + 64 k2

whose products convolve causally without padding to 2 L: what wraps around comes back multiplied by i, into the
imaginary part that nobody reads. The quarter turn costs nothing. It shifts the first block and the twiddle:

    F1[k1, n1] = exp(-2 pi i (k1 + 1/4) n1 / 64)
    T[k1, n2]  = exp(-2 pi i (k1 + 1/4) n2 / n)
    F2[n2, k2] = exp(-2 pi i n2 k2 / n2')

A spectrum is a (64, n2') matrix with frequency k1 + 64 k2 at [k1, k2], from 32 columns on in the order of `column_dft`:
the taps' spectrum is permuted so once, and nothing else ever is. Blocks are scaled by powers of two near 1/sqrt(their
size), so that float16 intermediates stay in the range of the input; the spectrum of the taps makes up the rest of 1/n.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.config import N1, Config


def _scale(size: int) -> float:
    return 2.0 ** -(size.bit_length() // 2)


def block_scale(config: Config) -> float:
    """What both blocks together multiply a spectrum by."""
    return _scale(N1) * _scale(config.n2)


def dft_tables(config: Config, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """F1 and its transpose, `(re | im | re | im, 64, 64)`; F2 in real form, `(2, n2, re | im k2)`; T, `(2, k1, n2)`.

    What the transform of the taps reads; `convolution_tables` makes what the convolution does.
    """
    k1, n2 = np.arange(N1)[:, None] + 0.25, np.arange(config.n2)
    f1 = np.exp(-2j * np.pi * (k1 * np.arange(N1) / N1 % 1)) * _scale(N1)
    f2 = np.exp(-2j * np.pi * (np.outer(n2, n2) % config.n2 / config.n2)) * _scale(config.n2)
    if config.n2 in column_dft.POINTS:
        f2 = column_dft.in_order(f2)
    t = np.exp(-2j * np.pi * k1 * n2 / config.points)

    def planes(z):
        return jnp.asarray(np.stack([z.real, z.imag]), dtype)

    real_form = np.stack([np.concatenate([f2.real, f2.imag], 1), np.concatenate([-f2.imag, f2.real], 1)])
    return jnp.concatenate([planes(f1), planes(f1.T)]), jnp.asarray(real_form, dtype), planes(t)


def convolution_tables(f1, f2, twiddle):
    """The convolution kernels' tables from those of `dft_tables`, in the form of `column_dft` if that applies."""
    if twiddle.shape[-1] not in column_dft.POINTS:
        return f1, f2, twiddle
    return f1, column_dft.blocks(*jnp.split(f2[0], 2, 1)), column_dft.twiddle_in_order(twiddle)


def twist(points: int) -> jax.Array:
    """The quarter turn over the length, exp(-pi i t / 2 n), in complex64."""
    angle = jnp.arange(points, dtype=jnp.float32) * (-0.5 * np.pi / points)
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def tap_spectra(taps: jax.Array, config: Config, *, before: bool) -> jax.Array:
    """The spectra that multiply those of blocks of u, `(count, lags, re | im, 64, n2)` in float32.

    That of lag l makes a block of the result from the block of u that lies l blocks earlier. Taps from n (l - 1) + 1 to
    n (l + 1) - 1 take part in it: in the right-angle transform a step before the first is n later and comes back with a
    factor i, so

        K_l = F(block l) + i F(block l - 1)

    Args:
      taps: `(count, blocks, n)` in float32: consecutive blocks of n lags; a single one may be shorter.
      config: whose order and scale the spectra take.
      before: whether the first block lies before the first lag; without it, zeros do.
    """
    n = config.points
    padded = jnp.pad(taps, [(0, 0), (0, 0), (0, n - taps.shape[-1])])
    blocks = jnp.fft.fft(padded * twist(n)) / (n * block_scale(config) ** 2)
    earlier = blocks[:, :-1] if before else jnp.pad(blocks[:, :-1], [(0, 0), (1, 0), (0, 0)])
    spectra = blocks[:, int(before) :] + 1j * earlier
    spectra = spectra.reshape(*spectra.shape[:2], config.n2, N1).swapaxes(-1, -2)
    if config.n2 in column_dft.POINTS:
        spectra = column_dft.in_order(spectra)
    return jnp.stack([spectra.real, spectra.imag], -3)


def tap_cotangent(d_spectra: jax.Array, taps: jax.Array, config: Config, *, before: bool) -> jax.Array:
    """The cotangent of taps whose spectra have this one, `(count, lags, re | im, 64, n2)`."""
    (d_taps,) = jax.vjp(lambda taps: tap_spectra(taps, config, before=before), taps)[1](d_spectra)
    return d_taps
