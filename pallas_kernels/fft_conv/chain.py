"""The butterfly chain of `kernel_sm90`: products with tables in shared memory, and the elementwise work between them.

Every kernel for Hopper takes the chain, or steps of it, from here.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.config import TILE, Config
from pallas_kernels.fft_conv.mosaic import by_columns, complex_planes, load, sums_of_products
from pallas_kernels.fft_conv.widening import widened


def floats(*arrays):
    """Each in float32."""
    return tuple(map(widened, arrays))


def apply_gate(x, gate, dtype):
    """The product of x and its gate, computed in float32."""
    (product,) = by_columns(lambda a, b: ((widened(a) * widened(b)).astype(dtype),), x, gate)
    return product


def times(z, w, dtype):
    """The complex product of (real, imaginary) pairs, computed in float32."""

    def product(a, b, c, d):
        a, b, c, d = floats(a, b, c, d)
        return (a * c - b * d).astype(dtype), (a * d + b * c).astype(dtype)

    return by_columns(product, *z, *w)


def conj_times(z, w, dtype):
    """conj(z w), likewise."""
    return by_columns(functools.partial(conj_product, dtype), *z, *w)


def conj_product(dtype, a, b, c, d):
    """conj((a + ib) (c + id))."""
    a, b, c, d = floats(a, b, c, d)
    return (a * c - b * d).astype(dtype), (-(a * d) - b * c).astype(dtype)


def correlate(a, b, c, d, re, im):
    """(re, im) + conj(a + ib) (c + id)."""
    a, b = floats(a, b)
    return re + a * c + b * d, im + a * d - b * c


def conj_correlate(dtype, a, b, c, d):
    """conj(conj(a + ib) (c + id))."""
    a, b = floats(a, b)
    return (a * c + b * d).astype(dtype), (b * c - a * d).astype(dtype)


def opaque_zeros(step, shift_by):
    """A function that returns zero, at every call another one as far as the compiler can tell.

    A tile's work that reads a table several times would otherwise keep its addresses in registers all the while.
    """
    calls = itertools.count()
    return lambda: lax.shift_right_logical(step + next(calls), shift_by)


def _joined(plane):
    """A matrix in shared memory, whole or by blocks of columns `(blocks, rows, columns)`, in registers."""
    if len(plane.shape) == 2:
        return load(plane)
    return lax.concatenate([load(plane.at[block]) for block in range(plane.shape[0])], 1)


@dataclasses.dataclass(frozen=True)
class Butterfly:
    """The chain of a tile's rows, over tables in shared memory, those of any blocks.

    `fresh()` is zero. Every table is read at an offset by it that changes with the loop for all that the compiler can
    tell: otherwise it computes some sixty descriptors and addresses before the loop and keeps them, in most of 128
    registers. If it is another zero at every call, none are kept from one table's use to the next either.
    """

    f1: Any
    f2: Any
    twiddle: Any
    fresh: Callable[[], Any]

    @classmethod
    def over(cls, scratch, fresh: Callable[[], Any]):
        """Over the tables of that name."""
        return cls(scratch["f1"], scratch["f2"], scratch["twiddle"], fresh)

    def first_block(self, transposed: bool = False):
        """Both parts of F1. A narrow row's product would spend itself in reading F1 again from shared memory."""
        if self.twiddle.shape[-1] == TILE:
            return tuple(plane.T if transposed else plane for plane in complex_planes(self.f1, self.fresh()))
        return tuple(map(_joined, complex_planes(self.f1, self.fresh() + 2 * transposed)))

    def right(self, tiles):
        """Z F2 for each z, as [Re z | Im z] times [[Re F2, Im F2], [-Im F2, Re F2]]."""
        n2 = self.f2.shape[-2]
        top, bottom = complex_planes(self.f2, self.fresh())
        sums = sums_of_products(*([(re, top), (im, bottom)] for re, im in tiles))
        return [(both[:, :n2], both[:, n2:]) for both in sums]

    def first(self, rows):
        """A for each of some real rows in shared memory."""
        sums = sums_of_products(*([(f1, row)] for row in rows for f1 in self.first_block()))
        return list(zip(sums[::2], sums[1::2], strict=True))

    def _second(self, tiles):
        """C for each A."""
        twiddle = complex_planes(self.twiddle, self.fresh())
        return self.right([times(z, twiddle, self.f1.dtype) for z in tiles])

    def _second_back(self, tiles, then):
        """E for each D; `then` runs before the first."""
        results = self.right(tiles)
        twiddle = complex_planes(self.twiddle, self.fresh())
        then()
        return (conj_times(z, twiddle, self.f1.dtype) for z in results)

    def forward(self, rows, then: Callable[[], None] = lambda: None):
        """The spectra of real rows in shared memory, a list of (64, n2); `then` runs once these are free again."""
        tiles = self.first(rows)
        then()
        return self._second(tiles)

    def inverse(self, conjugate_spectra, scratch):
        """The real rows whose conjugate spectra these are; scratch, a list of (2, 64, n2), carries E."""

        def left():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left the scratch

        for z, e in zip(self._second_back(conjugate_spectra, left), scratch, strict=True):
            e[0], e[1] = z
        plgpu.commit_smem()
        re, im = self.first_block(transposed=True)
        return sums_of_products(*([(re, e.at[0]), (im, e.at[1])] for e in scratch))


@dataclasses.dataclass(frozen=True)
class ByColumns(Butterfly):
    """The chain whose second block is that of `column_dft`."""

    # Products at once. Results come as they are asked for: what becomes of a row takes fewer registers than its C.
    together: int = column_dft.PAIR

    def _twiddles(self):
        """A function as `column_dft.there` takes it."""
        return functools.partial(column_dft.twiddles, complex_planes(self.twiddle, self.fresh()))

    def _operands(self, back: bool):
        return self._twiddles(), column_dft.half(self.f2, self.fresh(), back), self.f1.dtype, self.together

    def second(self, tiles):
        """Yields C of each A, 16 columns of it at a time."""
        return column_dft.there(tiles, *self._operands(back=False))

    def _second(self, tiles):
        return column_dft.joined(tiles, self.second(tiles))

    def _second_back(self, tiles, then):
        then()
        return column_dft.back(tiles, *self._operands(back=True))


def butterfly(config: Config, scratch, fresh: Callable[[], Any]) -> Butterfly:
    """The chain over the tables in shared memory, of whichever kind they are."""
    if config.n2 not in column_dft.POINTS:
        return Butterfly.over(scratch, fresh)
    together = 4 if config.n2 == 32 and config.warpgroups < 4 else column_dft.PAIR
    return dataclasses.replace(ByColumns.over(scratch, fresh), together=together)
