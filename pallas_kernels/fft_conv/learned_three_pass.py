"""The learned convolution of sequences that no tile holds: an outer stage, many short convolutions, one more stage.

A sequence of n = 4096 m steps is m rows u[n0] of 64 x 64. With blocks F0, F1, F2 on the way there and V2, V1, V0 on
the way back, and s = (k0 + 1/4) / m,

    Z[k0] = sum over n0 of F0[k0, n0] u[n0]                                                    (split)
    C[k0] = (T_k0 * (F1_k0 Z[k0])) F2,    W[k0] = V1_k0 (conj(T_k0) * ((C[k0] * K[k0]) V2))    (rows)
    y[n0] = Re sum over k0 of V0[n0, k0] W[k0]                                                 (join)

    F1_k0 = F1 diag(exp(-2 pi i s a / 64)),      V1_k0 = diag(exp(2 pi i s a / 64)) V1
    T_k0 = exp(-2 pi i (p + s) b / 4096)

where F0 and V0 hold the right angle's shift, as exact ones do in `outer_plan`, and K is the spectrum of the taps by
three blocks of its own. So the cotangent g of y is split by V0^H, and goes through V1_k0^H and V2^H just as u goes
through the blocks on the way there; `learned_rows_backward_sm90` makes of both, Z and H, all that is left to join or
to sum up:

    du = Re F0^H dZ,      dF0 = sum dZ u^T,      d(V0^H) = sum W g^T

A row of Z, of blocks that are padded with zeros to a multiple of four, is zero, and so is all that comes of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv import learned_rows_backward_sm90, learned_rows_forward_sm90, outer_sm90
from pallas_kernels.fft_conv.config import BLOCK, N1, TILE
from pallas_kernels.fft_conv.learned_rows import Shapes
from pallas_kernels.fft_conv.lowering import lowered_once
from pallas_kernels.fft_conv.outer_plan import _roots
from pallas_kernels.fft_conv.three_pass import _as_matrices, _stage


class Transform(NamedTuple):
    """Real and imaginary parts of the blocks of one transform, in float32."""

    outer: jax.Array
    """F0 or V0^H, `(re | im, m, m)`, `[k0, n0]`."""
    first: jax.Array
    """F1_k0 or V1_k0^H of each row, `(m, re | im, 64, 64)`, `[k1, n1]`."""
    second: jax.Array
    """F2 or V2^H, `(re | im, 64, 64)`, `[n2, k2]`."""


def transform(outer, first, second, rows: int) -> Transform:
    """Of complex blocks, `[k0, n0]`, `[k1, n1]` and `[n2, k2]`, for so many rows, of which those beyond m are zero."""
    m = outer.shape[0]
    outer = jnp.pad(outer, (0, rows - m))
    re, im = _roots(_shifts(rows, m) * jnp.arange(N1) / N1)
    return Transform(_planes(outer), _planes(first * jax.lax.complex(re, im)[:, None], 1), _planes(second))


def twiddle(rows: int, m: int) -> jax.Array:
    """T of each row, `(rows, re | im, 64, 64)` in float32."""
    p, b = jnp.arange(N1)[:, None], jnp.arange(TILE)
    return jnp.stack(_roots(p * b / BLOCK + _shifts(rows, m)[:, None] * b / BLOCK), 1)


def forward(u, taps, of_u: Transform, of_g: Transform, of_taps: Transform, twiddle, shift, blocks: int):
    """The convolution `(B, D, rows, 4096)` of u, and the taps' spectra `(D, m, re | im, 64, 64)` in the dtype of u.

    Args:
      u: `(B, D, rows, 4096)`, a multiple of 8 rows; those beyond m are left out.
      taps: `(D, K)` in float32.
      of_u: the way there.
      of_g: the adjoint of the way back.
      of_taps: that of the taps.
      twiddle: of all of them.
      shift: `[31]`, by which the kernels make their opaque zeros.
      blocks: of threads, at most.
    """
    spectra = tap_spectra(taps, *of_taps, twiddle).astype(u.dtype)
    shapes = _shapes(u, of_u, blocks)
    v1, v2 = _adjoint(of_g.first), _adjoint(of_g.second)
    tables = _three(of_u.first), of_u.second, _three(v1), v2, twiddle
    kernel = lowered_once(learned_rows_forward_sm90.forward, shapes)
    w = kernel(_split(u, of_u.outer), spectra, *(table.astype(u.dtype) for table in tables), shift)
    return _join(w, of_g.outer, u.shape[2]), spectra


def backward(u, g, taps, spectra, of_u: Transform, of_g: Transform, of_taps: Transform, twiddle, shift, blocks: int):
    """Cotangents, for g of the result: of u, of the taps and of the transforms of u, of g and of the taps.

    `forward` says what the arguments and the spectra are.
    """
    z, h = _split(u, of_u.outer), _split(g, of_g.outer)
    tables = (jnp.stack(pair) for pair in ((of_u.first, of_g.first), (of_u.second, of_g.second)))
    kernel = lowered_once(learned_rows_backward_sm90.backward, _shapes(u, of_u, blocks))
    dz, w, *parts = kernel(z, h, spectra, shift, *(table.astype(u.dtype) for table in (*tables, twiddle)))
    d_first, d_second, d_spectra = (part.sum(0) for part in parts)
    d_u, d_g = (
        Transform(_cotangent_of_outer(rows, x), d_first[:, side], d_second.sum(0)[side])
        for side, (rows, x) in enumerate(((dz, u), (w, g)))
    )
    _, cotangents = jax.vjp(lambda *x: tap_spectra(*x, twiddle), taps, *of_taps)
    d_taps, *d_of_taps = cotangents(d_spectra)
    return _join(dz, of_u.outer, u.shape[2]), d_taps, d_u, d_g, Transform(*d_of_taps)


def tap_spectra(taps, outer, first, second, twiddle):
    """K, `(D, m, re | im, 64, 64)` in float32, of taps `(D, at most n)` and the blocks of a `Transform`.

    By real products of float32 numbers, which a GPU rounds to 11 bits unless `jax_default_matmul_precision` says
    otherwise, as the products of the kernels do to fewer. In the names of the axes, p and q are real and imaginary
    part, n is n0, k is k0, a is n1, x is k1, b is n2 and y is k2.
    """
    features, count = taps.shape
    rows = -(-count // BLOCK)
    x = jnp.pad(taps, ((0, 0), (0, rows * BLOCK - count))).reshape(features, rows, N1, TILE)
    z = jnp.einsum("pkn,dnab->dkpab", outer[..., :rows], x)
    re, im = jnp.moveaxis(jnp.einsum("kqxpa,dkpab->dkqxb", _real_form(first), z), 2, 0)
    t_re, t_im = twiddle[:, 0], twiddle[:, 1]
    turned = jnp.stack([re * t_re - im * t_im, re * t_im + im * t_re], 2)
    return jnp.einsum("dkpxb,qbpy->dkqxy", turned, _real_form(second))


def _split(x, outer):
    """Z or H, `(B, 1, D, re | im m, 64, 64)`, of real rows `(B, D, rows, 4096)`."""
    batch, features, rows, _ = x.shape
    shapes = outer_sm90.Shapes(batch, 1, features, rows, 2 * outer.shape[1], x.dtype)
    return _as_matrices(_stage(shapes, x[:, None], None, jnp.concatenate(outer)[:, :rows]))


def _join(w, outer, rows: int):
    """The real part of the adjoint of a split, `(B, D, rows, 4096)`."""
    batch, _, features, parts, *_ = w.shape
    shapes = outer_sm90.Shapes(batch, 1, features, parts, rows, w.dtype)
    matrix = jnp.concatenate([part.T for part in outer], 1)[:rows]
    return _stage(shapes, w.reshape(*w.shape[:4], BLOCK), None, matrix)[:, 0]


def _cotangent_of_outer(rows, x):
    """Of the outer block `(re | im, m, m)`, for rows like Z and a real sequence x: sums of their products."""
    rows = rows.reshape(*rows.shape[:1], *rows.shape[2:4], BLOCK)
    products = jnp.einsum("bdkc,bdnc->bdkn", rows, x, preferred_element_type=jnp.float32)
    total = products.sum((0, 1)).reshape(2, -1, x.shape[2])
    m = total.shape[1]
    return jnp.pad(total[..., :m], ((0, 0), (0, 0), (0, max(0, m - x.shape[2]))))


def _shapes(u, of_u: Transform, blocks: int) -> Shapes:
    return Shapes(u.shape[0], u.shape[1], of_u.outer.shape[1], u.dtype, blocks)


def _shifts(rows: int, m: int):
    """That of each row."""
    return (jnp.arange(rows)[:, None] + 0.25) / m


def _planes(z, axis: int = 0):
    return jnp.stack([z.real, z.imag], axis).astype(jnp.float32)


def _adjoint(planes):
    """Of blocks `(..., re | im, 64, 64)`."""
    return jnp.stack([planes[..., 0, :, :].mT, -planes[..., 1, :, :].mT], -3)


def _three(planes):
    """Re | im | -im of `(m, re | im, 64, 64)`."""
    return jnp.concatenate([planes, -planes[:, 1:]], 1)


def _real_form(planes):
    """`(..., q, i, p, j)` of blocks `(..., re | im, i, j)`: multiplied by as [[re, -im], [im, re]]."""
    re, im = planes[..., 0, :, :], planes[..., 1, :, :]
    return jnp.stack([jnp.stack([re, -im], -2), jnp.stack([im, re], -2)], -4)
