"""What the kernels compute, in `jax.numpy`, for any platform and any derivative."""

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv.config import N1, Config
from pallas_kernels.fft_conv.tables import block_scale, tap_spectrum, twist


def spectrum_order(x: jax.Array, config: Config) -> jax.Array:
    """`(..., n)` frequencies as `(..., 64, n2)` with frequency k1 + 64 k2 at [k1, k2]."""
    return x.reshape(*x.shape[:-1], config.n2, N1).swapaxes(-1, -2)


def forward_reference(config: Config, u, taps):
    """`(B, C, D, L)` in float32 of u `(B, D, L)` and taps `(D, C, parts, K)`, as `tables.tap_spectrum` takes them."""
    n, length = config.points, u.shape[-1]
    turn = twist(n)
    padded = jnp.pad(u.astype(jnp.float32), [(0, 0), (0, 0), (0, n - length)])
    rows = spectrum_order(jnp.fft.fft(padded * turn), config)
    planes = tap_spectrum(taps.reshape(-1, *taps.shape[2:]), config).reshape(*taps.shape[:2], 2, *rows.shape[2:])
    spectrum = jax.lax.complex(planes[:, :, 0], planes[:, :, 1]).swapaxes(0, 1)
    product = (rows[:, None] * spectrum).swapaxes(-1, -2).reshape(*rows.shape[:1], *spectrum.shape[:2], n)
    y = jnp.fft.ifft(product) * (jnp.conj(turn) * (n * block_scale(config) ** 2))
    return y[..., :length].real


def backward_reference(config: Config, u, g, taps):
    """Cotangents of u, a share for each channel `(B, C, D, L)`, and of the taps, in float32."""
    shares = jnp.broadcast_to(u[:, None], g.shape).astype(jnp.float32)

    def each_channel(shares, taps):
        rows = [forward_reference(config, shares[:, c], taps[:, c : c + 1]) for c in range(shares.shape[1])]
        return jnp.concatenate(rows, 1)

    return jax.vjp(each_channel, shares, taps)[1](g.astype(jnp.float32))
