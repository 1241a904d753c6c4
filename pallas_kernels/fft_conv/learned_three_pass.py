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

    du = Re F0^H dZ,      dF0 = sum dZ u^T,      d(V0^H) = sum W g^T      (`learned_outer_sm90`)

From four on blocks are padded with zeros to a multiple of four. Those rows of Z are zero, and so is all that comes of
them.

The taps are one more sequence of each feature, in float16 whatever the convolution is in, that goes the way there
(`learned_rows_transform_sm90`). Their cotangents come of the same kernels as those of u, with blocks on the way back
that are identities and a spectrum that is one: of conj(T) times the cotangent of K in the place of H, as it is
transformed to that cotangent, all that is left to join or to sum up. Numbers are divided by the largest of their
feature.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv import (
    learned_outer_sm90,
    learned_rows_backward_sm90,
    learned_rows_forward_sm90,
    learned_rows_transform_sm90,
    outer_sm90,
)
from pallas_kernels.fft_conv.config import BLOCK, N1, TILE, Config
from pallas_kernels.fft_conv.learned_rows import Shapes
from pallas_kernels.fft_conv.lowering import lowered_once
from pallas_kernels.fft_conv.outer_plan import DIRECT_ROWS, _roots, outer_plan
from pallas_kernels.fft_conv.tables import block_scale
from pallas_kernels.fft_conv.three_pass import _as_matrices, _normalized, _stage


class Transform(NamedTuple):
    """Real and imaginary parts of the blocks of one transform, in float32."""

    outer: jax.Array
    """F0 or V0^H, `(re | im, m, m)`, `[k0, n0]`."""
    first: jax.Array
    """F1_k0 or V1_k0^H of each row, `(m, re | im, 64, 64)`, `[k1, n1]`."""
    second: jax.Array
    """F2 or V2^H, `(re | im, 64, 64)`, `[n2, k2]`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """m rows of 4096 points, and the most blocks of threads of a launch."""

    m: int
    blocks: int = 132

    @property
    def rows(self) -> int:
        """Those of Z: from four on a multiple of four, of which those beyond m are zero."""
        return self.m if self.m < 4 else outer_plan(self.m).rows

    @property
    def outer_scale(self) -> float:
        """What a split multiplies by, and a join again: a power of two near 1 / sqrt(m)."""
        return outer_plan(self.m).scale

    @property
    def inner_scale(self) -> float:
        """What each of the other blocks multiplies by, on both ways."""
        return block_scale(Config(TILE)) ** 0.5

    @property
    def spectrum_scale(self) -> float:
        """What the taps' spectra are multiplied by after their transform: with all blocks' scales 1/n is left."""
        return 1 / (self.m * BLOCK * (self.outer_scale * self.inner_scale**2) ** 3)

    @property
    def shifts(self) -> jax.Array:
        """The s of each row, `(rows, 1)`."""
        return (jnp.arange(self.rows)[:, None] + 0.25) / self.m

    def transform(self, outer, first, second) -> Transform:
        """Of complex blocks, `[k0, n0]`, `[k1, n1]` and `[n2, k2]`, without scales."""
        padded = jnp.pad(outer, (0, self.rows - self.m))
        re, im = _roots(self.shifts * jnp.arange(N1) / N1)
        first = first * jax.lax.complex(re, im)[:, None]
        blocks = self.outer_scale * padded, self.inner_scale * first, self.inner_scale * second
        return Transform(*(_planes(block, block.ndim - 2) for block in blocks))

    def twiddle(self) -> jax.Array:
        """T of each row, `(rows, re | im, 64, 64)` in float32."""
        p, b = jnp.arange(N1)[:, None], jnp.arange(TILE)
        return jnp.stack(_roots(p * b / BLOCK + self.shifts[:, None] * b / BLOCK), 1)


def forward(u, taps, of_u: Transform, of_g: Transform, of_taps: Transform, shift, plan: Plan):
    """The convolution `(B, D, rows, 4096)` of u, and in its dtype the spectra of the taps, `(D, rows of Z, 2, 64, 64)`.

    Args:
      u: `(B, D, rows, 4096)`, at most m rows.
      taps: `(D, rows, 4096)` in float32, likewise.
      of_u: the way there.
      of_g: the adjoint of the way back, without its 1/n.
      of_taps: that of the taps.
      shift: `[31]`, by which the kernels make their opaque zeros.
      plan: for what `Plan.transform` has made the transforms.
    """
    spectra = tap_spectra(taps, of_taps, u.dtype, shift, plan)
    w = _rows_forward(_split(u, of_u.outer), spectra, of_u, of_g, shift, plan)
    return _join(w, of_g.outer, u.shape[2]), spectra


def backward(u, g, taps, spectra, of_u: Transform, of_g: Transform, of_taps: Transform, shift, plan: Plan):
    """Cotangents, for g of the result: of u, of the taps and of the transforms of u, of g and of the taps.

    `forward` says what the arguments and the spectra are.
    """
    z, h = _split(u, of_u.outer), _split(g, of_g.outer)
    dz, w, d_first, d_second, d_spectra = _rows_backward(z, h, spectra, of_u, of_g, shift, plan)
    d_u_outer, d_u = _sum_and_join(dz, u, of_u.outer, plan)
    d_g_outer = _sum(w, g, plan)
    d_of_u, d_of_g = (
        Transform(outer, d_first[:, side], d_second[side]) for side, outer in enumerate((d_u_outer, d_g_outer))
    )
    d_taps, d_of_taps = tap_cotangents(taps, d_spectra, of_taps, shift, plan)
    return d_u, d_taps, d_of_u, d_of_g, d_of_taps


def tap_spectra(taps, of_taps: Transform, dtype, shift, plan: Plan):
    """The taps' spectra; `forward` says what the arguments are."""
    x, size = _normalized(taps[:, None])
    z = _split(x, of_taps.outer)
    tables = (table.astype(z.dtype) for table in (_three(of_taps.first), of_taps.second, plan.twiddle()))
    kernel = lowered_once(learned_rows_transform_sm90.transform, _shapes(z, plan), jnp.dtype(dtype))
    return kernel(z, size * plan.spectrum_scale, *tables, shift)


def tap_cotangents(taps, d_spectra, of_taps: Transform, shift, plan: Plan):
    """Of the taps and of their transform, for that of the spectra, `(D, rows of Z, re | im, 64, 64)` in float32.

    Cotangents of the spectra are divided by the largest of each feature, too. Those of the blocks are sums over
    features, weighed by what both factors were divided by in one of them, the taps: against the weight of the feature
    that counts most, and one that is zero has none.
    """
    x, size = _normalized(taps[:, None])
    _, height = _normalized(d_spectra)  # not of h, which is then made in one pass, and no larger but for sqrt(2)
    re, im = (d_spectra / height[:, None, None, None, None]).swapaxes(1, 2).swapaxes(0, 1)
    t_re, t_im = plan.twiddle().swapaxes(0, 1)
    h = jnp.concatenate([re * t_re + im * t_im, im * t_re - re * t_im], 1)[:, None, None].astype(jnp.float16)
    height = height * plan.spectrum_scale
    weight = jnp.where(_any(taps[:, None]) & _any(d_spectra), height * size, 0)
    most = jnp.where(jnp.any(weight), weight.max(), 1)
    weighed = x * (weight / most).astype(x.dtype)[:, None, None, None]
    z = _split(weighed, of_taps.outer)
    dz, _, d_first, d_second, _ = _rows_backward(z, h, _one(plan), of_taps, _identity(plan), shift, plan)
    d_outer, d_x = _sum_and_join(dz, weighed, of_taps.outer, plan)
    d_taps = d_x[:, 0].astype(jnp.float32) * height[:, None, None]
    return d_taps, Transform(most * d_outer, most * d_first[:, 0], most * d_second[0])


def _any(x):
    """Which of the features are not zero."""
    return jnp.abs(x).max(tuple(range(1, x.ndim))) > 0


def _one(plan: Plan):
    """A spectrum that changes nothing."""
    return jnp.stack([jnp.ones((1, plan.rows, N1, TILE)), jnp.zeros((1, plan.rows, N1, TILE))], 2)


def _identity(plan: Plan) -> Transform:
    """Of rows that neither block changes; the outer one is not used."""
    one = jnp.stack([jnp.eye(N1), jnp.zeros((N1, N1))])
    return Transform(one, jnp.broadcast_to(one, (plan.rows, *one.shape)), one)


def _rows_forward(z, spectra, there: Transform, back: Transform, shift, plan: Plan):
    """W, of the adjoint of the way back."""
    tables = _three(there.first), there.second, _three(_adjoint(back.first)), _adjoint(back.second), plan.twiddle()
    kernel = lowered_once(learned_rows_forward_sm90.forward, _shapes(z, plan))
    return kernel(z, spectra.astype(z.dtype), *(table.astype(z.dtype) for table in tables), shift)


def _rows_backward(z, h, spectra, of_z: Transform, of_h: Transform, shift, plan: Plan):
    """dZ, W and the cotangents of both transforms' blocks, `(m, 2, ...)` and `(2, ...)`, and of the spectra."""
    tables = jnp.stack([of_z.first, of_h.first]), jnp.stack([of_z.second, of_h.second]), plan.twiddle()
    kernel = lowered_once(learned_rows_backward_sm90.backward, _shapes(z, plan))
    in_dtype = (table.astype(z.dtype) for table in tables)
    dz, w, d_first, d_second, d_spectra = kernel(z, h, spectra.astype(z.dtype), shift, *in_dtype)
    return dz, w, d_first.sum(0), d_second.sum((0, 1)), d_spectra.sum(0)


def _shapes(z, plan: Plan) -> Shapes:
    return Shapes(z.shape[0], z.shape[2], plan.rows, z.dtype, plan.blocks)


def _split(x, outer):
    """Z or H, `(B, 1, D, re | im m, 64, 64)`, of real rows `(B, D, rows, 4096)`."""
    batch, features, rows, _ = x.shape
    together, padded = _together(batch * features, rows, outer.shape[1])
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    z = _stage_together(together, x, jnp.concatenate(outer)[:, :padded], 2 * outer.shape[1])
    return _as_matrices(z.reshape(batch, 1, features, -1, BLOCK))


def _join(w, outer, rows: int):
    """The real part of the adjoint of a split, `(B, D, rows, 4096)`."""
    batch, _, features, parts, *_ = w.shape
    together, padded = _together(batch * features, rows, outer.shape[1])
    matrix = _joining(outer, padded)
    x = _stage_together(together, w.reshape(batch, features, parts, BLOCK), matrix, padded)
    return x.reshape(batch, features, padded, BLOCK)[:, :, :rows]


def _together(sequences: int, rows: int, m: int) -> tuple[int, int]:
    """How many sequences a stage takes for one, and the rows it pads each to: it moves eight rows at a time.

    Example:
      >>> _together(8, 2, 2), _together(6, 4, 4), _together(5, 4, 4), _together(6, 40, 64)
      ((4, 2), (2, 4), (1, 8), (1, 40))
    """
    count = 8 // math.gcd(rows, 8)
    if sequences % count == 0 and count * m <= DIRECT_ROWS:
        return count, rows
    return 1, 8 * -(-rows // 8)


def _stage_together(count: int, x, matrix, rows: int):
    """The product of each sequence of x, `(B, D, rows, 4096)`, with a matrix, of so many rows for each."""
    x = x.reshape(1, 1, -1, count * x.shape[2], BLOCK)
    matrix = jnp.kron(jnp.eye(count), matrix)
    return _stage(outer_sm90.Shapes(1, 1, x.shape[2], x.shape[3], count * rows, x.dtype), x, None, matrix)


def _joining(outer, rows: int):
    """The matrix of a join, to at most so many rows."""
    return jnp.concatenate([part.T for part in outer], 1)[:rows]


def _sum(z, x, plan: Plan):
    """The cotangent of an outer block, `(re | im, rows, m)`: the sum of z x^T over batch, features and columns.

    Args:
      z: like Z.
      x: the real sequence that z is the cotangent of a split of, or the cotangent of what z is joined to.
      plan: for at least so many rows as x has.
    """
    operands, shapes = _flat(z, x, plan)
    (sums,) = lowered_once(learned_outer_sm90.product, shapes)(*operands)
    return _of_block(sums, shapes, plan)


def _sum_and_join(z, x, outer, plan: Plan):
    """`_sum`, and `_join` to as many rows as x has, which read z once where one kernel can do both."""
    operands, shapes = _flat(z, x, plan)
    batch, features, rows, _ = x.shape
    if not shapes.can_join:
        return _sum(z, x, plan), _join(z, outer, rows)
    shapes = dataclasses.replace(shapes, joins=True)
    matrix = shapes.stacked(_joining(outer, shapes.rows_of_x))
    sums, y = lowered_once(learned_outer_sm90.product, shapes)(*operands, matrix)
    y = y.reshape(shapes.sequences, -1, BLOCK)[: batch * features, :rows]
    return _of_block(sums, shapes, plan), y.reshape(x.shape)


def _flat(z, x, plan: Plan):
    """Both as `learned_outer_sm90` takes them, x with as many rows as a join pads it to, and the shapes of that.

    Two rows of each of an odd number of sequences, or three of each, need more sequences to fill tiles of eight rows.
    """
    batch, features, rows, _ = x.shape
    _, padded = _together(batch * features, rows, plan.rows)
    more = -batch * features % (8 // math.gcd(2 * plan.rows, 8))
    z, x = (part.reshape(batch * features, -1, BLOCK) for part in (z, x))
    z, x = jnp.pad(z, ((0, more), (0, 0), (0, 0))), jnp.pad(x, ((0, more), (0, padded - rows), (0, 0)))
    shapes = learned_outer_sm90.Shapes(len(x), 2 * plan.rows, padded, x.dtype, blocks=plan.blocks)
    return [part.reshape(-1, N1, TILE) for part in (z, x)], shapes


def _of_block(sums, shapes: learned_outer_sm90.Shapes, plan: Plan):
    """The cotangent of a block with as many columns as there are rows of Z."""
    total = shapes.cotangent(sums)[:, : plan.rows].reshape(2, plan.rows, -1)
    return jnp.pad(total, ((0, 0), (0, 0), (0, plan.rows - total.shape[2])))


def _planes(z, axis: int):
    return jnp.stack([z.real, z.imag], axis).astype(jnp.float32)


def _adjoint(planes):
    """Of blocks `(..., re | im, 64, 64)`."""
    return jnp.stack([planes[..., 0, :, :].mT, -planes[..., 1, :, :].mT], -3)


def _three(planes):
    """Re | im | -im of `(m, re | im, 64, 64)`."""
    return jnp.concatenate([planes, -planes[:, 1:]], 1)
