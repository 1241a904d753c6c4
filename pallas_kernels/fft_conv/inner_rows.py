"""What the kernels for rows of a long sequence do around the mathematics: who works on what, how it comes and goes.

An item is a row k1 of Z, a channel and a feature, for all of the batch or a share of it. The tables belong to k1, so a
block takes consecutive items, k1 slowest, and fetches tables only where k1 changes, and the next item's spectrum of the
taps, where there is room, while it works on one. Each warpgroup has a tile to itself: one row of 64 x 64 complex
points, whose real and imaginary parts are planes of their own, or rows of two sequences of the batch, 32 x 64 or
32 x 128 each, with both parts in one matrix.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, PIECE, matrices
from pallas_kernels.fft_conv.rearranged import PACKED


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a kernel is compiled for.

    Attributes:
      batch, channels, features: B, C and D.
      rows: m, those of Z.
      dtype: of Z, the tables and the result: bfloat16 or float16.
      sequences: 1 if the channels share Z, C if each has its own.
      height, width: of the matrix that a row is, 64 x 64, 32 x 64 or 32 x 128.
      together: rows of the batch in a tile; two of those that are 32 high, or one, which then does for two.
      warpgroups: of a block, each with a tile to itself.
      blocks: in the persistent grid.
    """

    batch: int
    channels: int
    features: int
    rows: int
    dtype: Any
    sequences: int = 1
    height: int = N1
    width: int = TILE
    together: int = 1
    warpgroups: int = 4
    blocks: int = 132

    @property
    def apart(self) -> bool:
        """Whether real and imaginary parts are matrices of their own."""
        return self.height == N1

    @property
    def matrices(self) -> int:
        """Of a tile."""
        return 2 if self.apart else self.together

    @property
    def planes(self) -> int:
        """Matrices that keep one row, or one row of the taps' cotangent."""
        return 2 if self.apart else 1

    @property
    def whole(self) -> bool:
        """Whether one copy moves a tile, and not one each of its matrices.

        A copy has five dimensions at most, and the columns of a wide row take two.
        """
        return not self.apart and self.width == TILE

    @property
    def copies(self) -> int:
        """That move a tile."""
        return 1 if self.whole else self.matrices

    @property
    def spectrum_slots(self) -> int:
        """Spectra of the taps in shared memory: one in use and, where there is room, the next one on its way."""
        return 2 if self.width == TILE else 1

    @property
    def spectrum(self) -> tuple[int, ...]:
        """Shape of a row's spectrum of the taps and of its twiddle factors: planes, or `in_thread_order`."""
        return (2, N1, TILE) if self.apart else (self.width // PIECE, *PACKED)

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """`(B, C, D, re | im m, 64, 64)`, or with both parts in a matrix `(B, C, D, m, re | im 32, width)`."""
        rows = self.planes * self.rows
        return jax.ShapeDtypeStruct((self.batch, self.channels, self.features, rows, N1, self.width), self.dtype)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which item and which rows of the batch a warpgroup works on at each step."""

    shapes: Shapes

    @property
    def spectra(self):
        """Of the taps, for each row of Z."""
        return self.shapes.channels * self.shapes.features

    @property
    def tiles(self):
        """Of the batch."""
        return pl.cdiv(self.shapes.batch, self.shapes.together)

    @property
    def splits(self):
        """Blocks that share a spectrum's batch, where there are fewer spectra than blocks."""
        turns = pl.cdiv(self.tiles, self.shapes.warpgroups)
        return max(1, min(self.shapes.blocks // (self.spectra * self.shapes.rows), turns))

    @property
    def share(self):
        """Tiles of one item."""
        return pl.cdiv(self.tiles, self.splits)

    @property
    def items(self):
        return self.shapes.rows * self.spectra * self.splits

    @property
    def visits(self):
        """Items of a block; the last blocks may have fewer."""
        return pl.cdiv(self.items, min(self.shapes.blocks, self.items))

    @property
    def grid(self):
        return pl.cdiv(self.items, self.visits)

    @property
    def rounds(self):
        """Steps that a warpgroup spends on one item."""
        return pl.cdiv(self.share, self.shapes.warpgroups)

    def item(self, visit):
        return lax.axis_index("block") * self.visits + visit

    def at(self, step):
        """(item, first row of the batch, whether there is any work) of this warpgroup."""
        item = self.item(step // self.rounds)
        turn = lax.rem(step, self.rounds) * self.shapes.warpgroups + lax.axis_index("warpgroup")
        row = (lax.rem(item, self.splits) * self.share + turn) * self.shapes.together
        inside = (step < self.visits * self.rounds) & (item < self.items)
        return item, row, inside & (turn < self.share) & (row < self.shapes.batch)

    def place(self, item):
        """(k1, channel, feature) of an item."""
        k1, spectrum = item // (self.spectra * self.splits), lax.rem(item // self.splits, self.spectra)
        return k1, spectrum // self.shapes.features, lax.rem(spectrum, self.shapes.features)


@dataclasses.dataclass(frozen=True)
class Block:
    """Tables, tiles and spectra come in, results leave, warpgroups keep in step."""

    schedule: Schedule
    scratch: Any
    rows: tuple[str, ...]

    @property
    def shapes(self):
        return self.schedule.shapes

    @property
    def barriers(self):
        return self.scratch["barriers"]

    @property
    def group(self):
        return lax.axis_index("warpgroup")

    def _arrived(self, name, zero):
        return self.barriers["rows"].at[self.rows.index(name) * self.schedule.shapes.warpgroups + self.group + zero]

    def _matrices(self, array, channel, step):
        """Those of a tile in an array in memory, as many as copies.

        TMA reads zeros beyond the batch, and writes nothing there; with wide rows the last one is repeated there.
        """
        shapes = self.shapes
        item, row, _ = self.schedule.at(step)
        k1, _, feature = self.schedule.place(item)
        if shapes.apart:
            return [array.at[row, channel, feature, plane * shapes.rows + k1] for plane in range(shapes.planes)]
        if shapes.whole:
            return [array.at[pl.ds(row, shapes.together), channel, feature, k1]]
        rows = (jnp.minimum(row + at, shapes.batch - 1) for at in range(shapes.together))
        return [array.at[row, channel, feature, k1] for row in rows]

    def _places(self, name, zero):
        """Their places in shared memory."""
        shapes, tile = self.shapes, self.scratch[name].at[self.group + zero]
        return [tile] if shapes.whole else [tile.at[number] for number in range(shapes.matrices)]

    def fetch(self, name, source, sequences, step, zero):
        """Starts the copy of this warpgroup's tile at a step."""
        item, _row, work = self.schedule.at(step)
        channel = self.schedule.place(item)[1] if sequences > 1 else 0

        @pl.when(work)
        def _():
            for matrix, place in zip(self._matrices(source, channel, step), self._places(name, zero), strict=True):
                plgpu.copy_gmem_to_smem(matrix, place, self._arrived(name, zero))

    def await_tile(self, name, zero):
        plgpu.barrier_wait(self._arrived(name, zero))

    def tile(self, name, zero):
        """The matrices of this warpgroup's tile in shared memory."""
        return [self.scratch[name].at[self.group + zero, number] for number in range(self.shapes.matrices)]

    def fetch_spectrum(self, spectrum, visit):
        item = self.schedule.item(visit)

        @pl.when((self.group == 0) & (visit < self.schedule.visits) & (item < self.schedule.items))
        def _():
            k1, channel, feature = self.schedule.place(item)
            slot = lax.rem(visit, self.shapes.spectrum_slots)
            for source, target in _planes(spectrum.at[feature, channel, k1], self.scratch["spectrum"].at[slot]):
                plgpu.copy_gmem_to_smem(source, target, self.barriers["spectrum"].at[slot])

    def begin(self, f2, spectrum=None):
        """Starts the copies of what a block needs first."""

        @pl.when(self.group == 0)
        def _():
            plgpu.copy_gmem_to_smem(f2.at[0], self.scratch["f2"].at[0], self.barriers["f2"])

        if spectrum is not None and self.shapes.spectrum_slots > 1:
            self.fetch_spectrum(spectrum, jnp.int32(0))
        plgpu.barrier_wait(self.barriers["f2"])

    def begin_item(self, f1, twiddle, visit, spectrum=None):
        """Waits for the item's spectrum, and its tables where they change, and starts the next spectrum's copy."""
        item = self.schedule.item(visit)
        k1 = self.schedule.place(item)[0]
        tables_change = (visit == 0) | (self.schedule.place(item - 1)[0] != k1)

        @pl.when(item < self.schedule.items)
        def _():
            plgpu.barrier_arrive(self.barriers["done"])  # all are past the last item: its tables and slot are free
            plgpu.barrier_wait(self.barriers["done"])
            if spectrum is not None:
                self.fetch_spectrum(spectrum, visit + self.shapes.spectrum_slots - 1)

            @pl.when(tables_change)
            def _():
                @pl.when(self.group == 0)
                def _():
                    for name, table in (("f1", f1), ("twiddle", twiddle)):
                        for source, target in _planes(table.at[k1], self.scratch[name]):
                            plgpu.copy_gmem_to_smem(source, target, self.barriers["tables"])

                plgpu.barrier_wait(self.barriers["tables"])

            if spectrum is not None:
                plgpu.barrier_wait(self.barriers["spectrum"].at[lax.rem(visit, self.shapes.spectrum_slots)])

    def taps(self, visit, zero):
        """The spectrum of the taps, as `Shapes.spectrum`."""
        return self.scratch["spectrum"].at[lax.rem(visit, self.shapes.spectrum_slots) + zero]

    def store(self, name, target, step, zero):
        """Starts the copy of a tile of results to its place."""
        item, row, _ = self.schedule.at(step)
        matrices = self._matrices(target, self.schedule.place(item)[1], step)
        for number, (place, matrix) in enumerate(zip(self._places(name, zero), matrices, strict=True)):

            def copy(place=place, matrix=matrix):
                plgpu.copy_smem_to_gmem(place, matrix)

            if number == 0 or self.shapes.apart:
                copy()
            else:
                pl.when(row + number < self.shapes.batch)(copy)


def tiles(shapes: Shapes):
    """Shared memory for a tile of each warpgroup."""
    return matrices((shapes.warpgroups, shapes.matrices, N1, shapes.width), shapes.dtype, TILE)


def planes(shapes: Shapes, dtype=None):
    """Shared memory for two matrices of each warpgroup, real and imaginary part of a spectrum."""
    return matrices((shapes.warpgroups, 2, N1, TILE), dtype or shapes.dtype, CHUNK)


def spectrum_slots(shapes: Shapes):
    """Shared memory for the taps' spectrum and the next one."""
    return _elementwise(shapes, shapes.spectrum_slots)


def _second_blocks(shapes: Shapes):
    """Shape of the second block's table: both ways, or one that does for both."""
    plane, rows, columns = column_dft.blocks_shape(shapes.width)
    return plane, rows if shapes.apart else rows // 2, columns


def _elementwise(shapes: Shapes, *count: int):
    """Shared memory for spectra of the taps or twiddle factors."""
    if shapes.apart:
        return matrices((*count, *shapes.spectrum), shapes.dtype, columns=CHUNK)
    return plgpu.SMEM((*count, *shapes.spectrum), F32)


def _planes(source, target):
    """Pairs of what a table is copied by: matrices, or all of what is in the order of threads."""
    if source.shape[-2:] == PACKED:
        return [(source, target)]
    return [(source.at[plane], target.at[plane]) for plane in range(source.shape[0])]


def scratch_types(shapes: Shapes, names: tuple[str, ...], **more):
    """Shared memory and barriers: the tables, tiles that are copied in, and what else there is."""
    groups, dtype = shapes.warpgroups, shapes.dtype
    first_blocks = 3 if shapes.apart else 1
    return dict(
        f1=matrices((first_blocks, N1, N1), dtype, columns=TILE),
        f2=matrices(_second_blocks(shapes), dtype, columns=CHUNK),
        twiddle=_elementwise(shapes),
        **{name: tiles(shapes) for name in names},
        **more,
        barriers={
            "f2": plgpu.Barrier(num_arrivals=1),
            "tables": plgpu.Barrier(num_arrivals=first_blocks + shapes.planes),
            "spectrum": plgpu.Barrier(num_arrivals=shapes.planes, num_barriers=shapes.spectrum_slots),
            "done": plgpu.Barrier(num_arrivals=groups),
            "rows": plgpu.Barrier(num_arrivals=shapes.copies, num_barriers=len(names) * groups),
        },
    )
