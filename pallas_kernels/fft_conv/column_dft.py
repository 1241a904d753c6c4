"""DFTs along the columns, of n = 16 r points: one step of radix r in registers, then 16 points on the tensor cores.

With b = 16 b1 + b0 and k = k0 + r k1, r = 2, 4 or 8,

    sum over b of exp(-2 pi i b k / n) z[b]
        = sum over b0 of F_k0[b0, k1] (sum over b1 of exp(-2 pi i b1 k0 / r) z[16 b1 + b0])
    F_k0[b0, k1] = exp(-2 pi i b0 (k0 + r k1) / n)

The inner sum takes additions alone, and in the layout of the tensor cores' results all of its terms belong to one
thread. Each F_k0 is a block of 16 complex points, so that there are an r-th of the products of a whole block of n, and
of what they read from shared memory. Frequencies stay where they come out, in the order (k0, k1), those of the taps'
spectrum too. The way back has the same steps in the opposite order, with the transposed blocks.

The twiddle factors beside it are kept in the order (b0 // 8, b1, b0 % 8), in which pieces of 8 columns take them, and
divided by r, for which the F_k0 make up: the sums of r terms are rounded to the 16 bits of the sequences, and would
leave float16's range for sequences that are an r-th as large.
"""

import itertools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.mosaic import CHUNK, PIECE, load, sums_of_products
from pallas_kernels.fft_conv.widening import widened

POINTS = (32, 64)
"""Widths of the fused kernels that take their second block so; rows of long sequences may have 128."""

PAIR = 2
"""Products at once: of more, kernels of 128 registers have none left to issue them one after the other."""


def blocks_shape(points: int) -> tuple[int, int, int]:
    """Of the table that `blocks` makes, 256 bytes a point; a matrix of all points has 8, 32 or 128 KB.

    Example:
      >>> blocks_shape(64)
      (1, 256, 32)
    """
    return 1, 4 * points, 2 * CHUNK


def radix(points: int) -> int:
    """That of the step in registers, by which twiddle factors are divided.

    Example:
      >>> radix(64)
      4
    """
    return points // CHUNK


def in_order(spectrum):
    """A spectrum `(..., n)`, by k, in the order in which frequencies are kept."""
    return spectrum.reshape(*spectrum.shape[:-1], CHUNK, -1).swapaxes(-1, -2).reshape(spectrum.shape)


def twiddle_in_order(twiddle):
    """Twiddle factors `(..., n)` over r, in the order in which they are taken."""
    cut = twiddle.reshape(*twiddle.shape[:-1], -1, CHUNK // PIECE, PIECE)
    return cut.swapaxes(-3, -2).reshape(twiddle.shape) / cut.shape[-3]


def blocks(re, im) -> jax.Array:
    """The table of r F_k0 in real form: there and back, k0, then rows of real and of imaginary parts.

    Args:
      re: real part of the DFT matrix, `(n, n)`, whose columns are `in_order`.
      im: imaginary part.
    """
    points = re.shape[-1]
    re, im = (part[:CHUNK].reshape(CHUNK, -1, CHUNK).swapaxes(0, 1) * (points // CHUNK) for part in (re, im))

    def real_form(re, im):
        return jnp.concatenate([jnp.concatenate([re, im], 2), jnp.concatenate([-im, re], 2)], 1)

    return jnp.concatenate([real_form(re, im), real_form(re.mT, im.mT)]).reshape(blocks_shape(points))


def half(table, zero, back: bool):
    """That part of the table, in shared memory."""
    rows = table.shape[1] // 2
    return table.at[zero, pl.ds(back * rows, rows)]


def _radix_2(z):
    """The sums over b1 of (-1)^(b1 k0) z[b1], for each k0, of pairs (re, im)."""
    (a, b), (c, d) = z
    return [(a + c, b + d), (a - c, b - d)]


def _radix_4(z):
    """The sums over b1 of (-i)^(b1 k0) z[b1], likewise."""
    (a, b), (c, d), (e, f), (g, h) = z
    (p, q), (r, s) = (a + e, b + f), (a - e, b - f)
    (t, u), (v, w) = (c + g, d + h), (c - g, d - h)
    return [(p + t, q + u), (r + w, s - v), (p - t, q - u), (r - w, s + v)]


def _radix_8(z):
    """The sums over b1 of exp(-2 pi i b1 k0 / 8) z[b1], likewise."""
    even, odd = _radix_4(z[::2]), _radix_4(z[1::2])
    half = 0.5**0.5
    (a, b), (c, d), (e, f), (g, h) = odd
    turned = [(a, b), (half * (c + d), half * (d - c)), (f, -e), (half * (h - g), -half * (g + h))]
    pairs = list(zip(even, turned, strict=True))
    return [(p + r, q + s) for (p, q), (r, s) in pairs] + [(p - r, q - s) for (p, q), (r, s) in pairs]


_RADIX_SUMS = {1: lambda z: z, 2: _radix_2, 4: _radix_4, 8: _radix_8}


def radix_sums(z):
    """The sums over b1 of exp(-2 pi i b1 k0 / r) z[b1], for each k0, of r = 1, 2, 4 or 8 pairs (re, im)."""
    return _RADIX_SUMS[len(z)](z)


def twiddles(planes, piece: int):
    """Those of columns 16 b1 + 8 piece and the seven next, for each b1, of two planes `twiddle_in_order`."""
    width = planes[0].shape[-1] // 2
    places = range(piece * width, (piece + 1) * width, CHUNK)
    wide = [[load(part.at[:, pl.ds(at, CHUNK)]) for part in planes] for at in places]
    return [tuple(widened(part[:, i : i + PIECE]) for part in both) for both in wide for i in (0, PIECE)]


def _products(zs, table, together: int, transposed: bool = False):
    """For each z and k0 its columns of z times its block, or its transpose, `(64, 16)` pairs, so many at once."""

    def factors(parts, at):
        """One of both parts; of rows of 2048 steps two, as with one they spill with four warpgroups."""
        if not transposed and zs[0][0].shape[1] == 2 * CHUNK:
            return [(part, table.at[pl.ds(2 * at + number * CHUNK, CHUNK)]) for number, part in enumerate(parts)]
        block = table.at[pl.ds(2 * at, 2 * CHUNK)]
        return [(lax.concatenate(parts, 1), block.T if transposed else block)]

    sums = [factors([part[:, at : at + CHUNK] for part in z], at) for z in zs for at in range(0, z[0].shape[1], CHUNK)]
    for first in range(0, len(sums), together):
        for both in sums_of_products(*sums[first : first + together]):
            yield both[:, :CHUNK], both[:, CHUNK:]


def _side_by_side(pieces):
    """Pieces of 8 columns, `[b0 // 8][16 columns][part]`, as two matrices."""
    radix = len(pieces[0])
    return tuple(lax.concatenate([half[at][part] for at in range(radix) for half in pieces], 1) for part in (0, 1))


def there(zs, twiddle, table, dtype, together: int = PAIR):
    """Yields the transform of z T, for each z and k0 `(64, 16)` pairs in float32, as z is.

    The twiddle factors are a function, `twiddles` of their planes or another one that returns the like. The table is
    the first half of `blocks`.
    """
    yield from _products([_turned(z, twiddle, dtype) for z in zs], table, together)


def _turned(z, twiddle, dtype):
    """Z T after the step in registers."""
    pieces = []
    for piece in range(CHUNK // PIECE):
        turned = []
        for b1, (c, d) in enumerate(twiddle(piece)):
            a, b = (part[:, CHUNK * b1 + PIECE * piece :][:, :PIECE] for part in z)
            turned.append((a * c - b * d, a * d + b * c))
        pieces.append([tuple(part.astype(dtype) for part in both) for both in radix_sums(turned)])
    return _side_by_side(pieces)


def back(zs, twiddle, table, dtype, together: int = PAIR):
    """Yields conj(z' T) of the transform z' of each z, whose columns are frequencies.

    The table is the second half of `blocks`.
    """
    for sums in _of_each(zs, _products(zs, table, together)):
        pieces = []
        for piece in range(CHUNK // PIECE):
            columns = slice(PIECE * piece, PIECE * (piece + 1))
            results = radix_sums([tuple(part[:, columns] for part in both) for both in sums])
            turned = zip(results, twiddle(piece), strict=True)
            pieces.append(
                [((a * c - b * d).astype(dtype), (-(a * d) - b * c).astype(dtype)) for (a, b), (c, d) in turned]
            )
        yield _side_by_side(pieces)


def adjoint(zs, twiddle, table, dtype, together: int = PAIR):
    """Yields the adjoint of `there` of each z, in the dtype, by the same half of the table."""
    for sums in _of_each(zs, _products(zs, table, together, transposed=True)):
        pieces = []
        for piece in range(CHUNK // PIECE):
            columns = slice(PIECE * piece, PIECE * (piece + 1))
            # Conjugate roots: those of the way there for the parts exchanged.
            results = radix_sums([(im[:, columns], re[:, columns]) for re, im in sums])
            turned = zip(results, twiddle(piece), strict=True)
            pieces.append([((a * c + b * d).astype(dtype), (b * c - a * d).astype(dtype)) for (b, a), (c, d) in turned])
        yield _side_by_side(pieces)


def joined(zs, parts):
    """What `there` yields, for each z two matrices `(64, n)`."""
    for of_one in _of_each(zs, parts):
        yield tuple(lax.concatenate(list(part), 1) for part in zip(*of_one, strict=True))


def _of_each(zs, parts):
    """Those of each z, of parts that come one by one."""
    for z in zs:
        yield list(itertools.islice(parts, z[0].shape[1] // CHUNK))
