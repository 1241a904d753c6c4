"""What the kernels compute, in `jax.numpy`, for any platform and any derivative."""

import jax
import jax.numpy as jnp


def gated(x, gate):
    """The product in float32, rounded once to the dtype of x; x where there is no gate."""
    return x if gate is None else (x.astype(jnp.float32) * gate.astype(jnp.float32)).astype(x.dtype)


def forward_reference(u, taps):
    """The convolution `(B, C, D, L)` in float32 of u `(B, D, L)`, or of `(B, C, D, L)`, one u for each channel.

    Taps are `(D, C, blocks, n)`, lags from 0 or, where there are twice the blocks of u, from as many before it.
    """
    length, (blocks, n) = u.shape[-1], taps.shape[-2:]
    ahead = n * (blocks - -(-length // n) if blocks > -(-length // n) else 0)
    u = u if u.ndim == 4 else u[:, None]
    points = length + blocks * n
    lags = taps.reshape(*taps.shape[:2], -1).swapaxes(0, 1)
    spectrum = jnp.fft.rfft(u.astype(jnp.float32), points) * jnp.fft.rfft(lags, points)
    return jnp.fft.irfft(spectrum, points)[..., ahead : ahead + length]


def backward_reference(u, g, taps):
    """Cotangents of u, a share for each channel `(B, C, D, L)`, and of the taps, in float32."""
    shares = jnp.broadcast_to(u[:, None], g.shape).astype(jnp.float32)
    return jax.vjp(forward_reference, shares, taps)[1](g.astype(jnp.float32))
