"""The transform of a tile of rows between the outer stages of a long sequence, and the way back.

Rows are complex here, and the shift of their transform, another one for each of the m rows of a sequence, keeps what
belongs to it (`outer_plan`). After the first product both chains have real and imaginary parts in matrices of their
own, and the rest is that of `column_dft`.

A row of 64 x 64 points has its parts in two planes, and a product with the first block takes four real ones. Of rows of
32 x 64 points one real product does, of half as many operations for a point,

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
from pallas_kernels.fft_conv.config import TILE
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

    def _spectrum(self, row):
        """Of what the first product left, (re, im)."""
        table = column_dft.half(self.scratch["f2"], self.fresh(), back=False)
        (spectrum,) = column_dft.joined([row], column_dft.there([row], self._twiddles(), table, self.dtype))
        return spectrum

    def _back(self, conjugate):
        """What the last product takes, of a conjugate spectrum."""
        table = column_dft.half(self.scratch["f2"], self.fresh(), back=True)
        (row,) = column_dft.back([conjugate], self._twiddles(), table, self.dtype)
        return row

    def _first_block(self, plane: int = 0):
        return self.scratch["f1"].at[self.fresh() + plane]

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
        return self._spectrum(row)

    def inverse(self, conjugate, tile):
        """Writes the tile whose conjugate spectrum this is; the place of the result carries the intermediate."""
        self._put(tile, self._back(conjugate))
        zero = self.fresh()
        f1_re, f1_im, minus_im = (self.scratch["f1"].at[zero + plane].T for plane in range(3))
        re, im = tile()
        w = sums_of_products([(f1_re, re), (f1_im, im)], [(f1_re, im), (minus_im, re)])
        plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
        self._put(tile, w)

    def _twiddles(self):
        return functools.partial(column_dft.twiddles, complex_planes(self.scratch["twiddle"], self.fresh()))

    @staticmethod
    def with_taps(function, spectrum, taps):
        """`function(a, b, c, d)`, to a pair, of the parts of a spectrum and of the taps', a few columns at a time."""
        return by_columns(function, *complex_planes(taps, 0), *spectrum)

    @staticmethod
    def parts(tile):
        """Real and imaginary part of a spectrum in shared memory that is kept like a row."""
        return tuple(map(load, tile))

    @staticmethod
    def summed(spectrum):
        """A spectrum as it is kept like a row."""
        return spectrum


@dataclasses.dataclass(frozen=True)
class Paired(_Chain):
    """Of rows of 32 x 64 points of two sequences, or of one as if it were both. See `Apart`."""

    def forward(self, tile, then):
        """Likewise."""
        first_block = self._first_block().T
        rows = sums_of_products(*([(first_block, matrix)] for matrix in tile))
        plgpu.commit_smem()  # the whole warpgroup has read them
        then()
        return self._spectrum(exchanged(rows[0], rows[-1]))

    def inverse(self, conjugate, tile):
        """Likewise."""
        self._put(tile, exchanged(*self._back(conjugate))[: len(tile())])
        first_block = self._first_block()
        w = sums_of_products(*([(first_block, matrix)] for matrix in tile()))
        plgpu.commit_smem()  # the whole warpgroup has read what the results replace
        self._put(tile, w)

    def _twiddles(self):
        table, zero = self.scratch["twiddle"], self.fresh()
        pieces = CHUNK // PIECE
        return lambda piece: [unpacked(table.at[zero + at + piece]) for at in range(0, TILE // PIECE, pieces)]

    @staticmethod
    def with_taps(function, spectrum, taps):
        """Likewise."""
        pairs = [
            function(*unpacked(taps.at[at // PIECE]), *(part[:, at : at + PIECE] for part in spectrum))
            for at in range(0, TILE, PIECE)
        ]
        return tuple(lax.concatenate(parts, 1) for parts in zip(*pairs, strict=True))

    @staticmethod
    def parts(tile):
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
