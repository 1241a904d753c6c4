"""The transform of a tile of rows between the outer stages of a long sequence, and the way back.

Rows are complex here, and the shift of their transform, another one for each of the m rows of a sequence, keeps what
belongs to it (`outer_plan`). After the first product both chains have real and imaginary parts in matrices of their
own, and the rest is that of `column_dft`.

A row of 64 x 64 points has its parts in two planes, and a product with the first block takes four real ones. Of rows of
32 x 64 or 32 x 128 points one real product does, of half as many operations for a point,

    [[Re F1, -Im F1], [Im F1, Re F1]] [Re Z; Im Z]

whose rows are ordered so that each thread has both parts of what it has: real parts in the first 8 of each 16 rows.
Rows of two sequences make a tile, whose parts `rearranged` puts together. Half of the first block's products left out
took 7 % from the time of a convolution of 65,536 steps by rows of 64 x 64, all of the second block's products nothing.
"""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.chain import conj_correlate, conj_product
from pallas_kernels.fft_conv.inner_rows import Shapes
from pallas_kernels.fft_conv.mosaic import CHUNK, PIECE, by_columns, complex_planes, load, sums_of_products
from pallas_kernels.fft_conv.rearranged import exchanged, unpacked


@dataclasses.dataclass(frozen=True)
class _Chain:
    """Over the tables in shared memory; `fresh()` is always zero.

    Every table is read at a zero of its own, as in `chain`.
    """

    scratch: Any
    dtype: Any
    fresh: Any

    def _spectrum(self, row, table):
        """Of what the first product left, (re, im)."""
        (spectrum,) = column_dft.joined([row], column_dft.there([row], self._twiddles(), table, self.dtype))
        return spectrum

    def _twiddles(self):
        """A function as `column_dft.there` takes it."""
        raise NotImplementedError

    def _put(self, tile, values):
        """Into a tile's place in shared memory."""
        for place, value in zip(tile(), values, strict=True):
            place[...] = value.astype(self.dtype)
        plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class Apart(_Chain):
    """Of one row of 64 x 64 points, whose parts are matrices of their own."""

    def forward(self, tile, then):
        """The spectrum of a tile in shared memory, (re, im); `then` runs once all of the tile has been read."""
        zero = self.fresh()
        f1_re, f1_im, minus_im = (self.scratch["f1"].at[zero + plane] for plane in range(3))
        re, im = tile
        row = sums_of_products([(f1_re, re), (minus_im, im)], [(f1_re, im), (f1_im, re)])
        plgpu.commit_smem()  # the whole warpgroup has read it
        then()
        return self._spectrum(row, column_dft.half(self.scratch["f2"], self.fresh(), back=False))

    def inverse(self, product, tile):
        """Writes the tile whose spectrum a product is; the place of the result carries the intermediate."""
        table = column_dft.half(self.scratch["f2"], self.fresh(), back=True)
        (row,) = column_dft.back([product], self._twiddles(), table, self.dtype)
        self._put(tile, row)
        zero = self.fresh()
        f1_re, f1_im, minus_im = (self.scratch["f1"].at[zero + plane].T for plane in range(3))
        re, im = tile()
        w = sums_of_products([(f1_re, re), (f1_im, im)], [(f1_re, im), (minus_im, re)])
        plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
        self._put(tile, w)

    def _twiddles(self):
        return functools.partial(column_dft.twiddles, complex_planes(self.scratch["twiddle"], self.fresh()))

    def times(self, spectrum, taps):
        """The product of two spectra as `inverse` takes it: its conjugate."""
        return by_columns(functools.partial(conj_product, self.dtype), *complex_planes(taps, 0), *spectrum)

    def correlated(self, spectrum, taps):
        """The product with the conjugate of the taps' spectrum likewise."""
        return by_columns(functools.partial(conj_correlate, self.dtype), *complex_planes(taps, 0), *spectrum)

    @staticmethod
    def product(tile):
        """A spectrum in shared memory that is kept like a row, as `inverse` takes it."""
        re, im = map(load, tile)
        return re, -im

    @staticmethod
    def summed(spectrum):
        """A spectrum as it is kept like a row."""
        return spectrum


@dataclasses.dataclass(frozen=True)
class Paired(_Chain):
    """Of rows of 32 x 64 or 32 x 128 points of two sequences, or of one as if it were both. See `Apart`."""

    def forward(self, tile, then):
        """Likewise."""
        first_block = self.scratch["f1"].at[self.fresh()].T
        rows = sums_of_products(*([(first_block, matrix)] for matrix in tile))
        plgpu.commit_smem()  # the whole warpgroup has read them
        then()
        return self._spectrum(exchanged(rows[0], rows[-1]), self.scratch["f2"].at[self.fresh()])

    def inverse(self, product, tile):
        """Likewise."""
        table = self.scratch["f2"].at[self.fresh()]
        (row,) = column_dft.adjoint([product], self._twiddles(), table, self.dtype)
        self._put(tile, exchanged(*row)[: len(tile())])
        first_block = self.scratch["f1"].at[self.fresh()]
        w = sums_of_products(*([(first_block, matrix)] for matrix in tile()))
        plgpu.commit_smem()  # the whole warpgroup has read what the results replace
        self._put(tile, w)

    def _twiddles(self):
        table, zero = self.scratch["twiddle"], self.fresh()
        pieces = CHUNK // PIECE
        return lambda piece: [unpacked(table.at[zero + at + piece]) for at in range(0, table.shape[0], pieces)]

    def times(self, spectrum, taps):
        """The product of two spectra as `inverse` takes it."""
        return self._with_taps(lambda c, d, a, b: (a * c - b * d, a * d + b * c), spectrum, taps)

    def correlated(self, spectrum, taps):
        """The product with the conjugate of the taps' spectrum likewise."""
        return self._with_taps(lambda c, d, a, b: (a * c + b * d, b * c - a * d), spectrum, taps)

    def _with_taps(self, function, spectrum, taps):
        pairs = []
        for piece in range(taps.shape[0]):
            columns = slice(piece * PIECE, (piece + 1) * PIECE)
            pair = function(*unpacked(taps.at[piece]), *(part[:, columns] for part in spectrum))
            pairs.append([part.astype(self.dtype) for part in pair])
        return tuple(lax.concatenate(parts, 1) for parts in zip(*pairs, strict=True))

    @staticmethod
    def product(tile):
        """Likewise, twice."""
        (matrix,) = map(load, tile)
        return exchanged(matrix, matrix)

    @staticmethod
    def summed(spectrum):
        """The sum of both spectra likewise."""
        first, second = exchanged(*spectrum)
        return (first + second,)


def chain(shapes: Shapes, scratch, fresh) -> Apart | Paired:
    """That of such tiles."""
    return (Apart if shapes.apart else Paired)(scratch, shapes.dtype, fresh)
