"""What the kernels of at most 4096 steps do around the mathematics: who works on what, and how it comes and goes.

A warpgroup works on a tile at a time, `Config.rows` rows of the batch side by side. `Schedule` says which, `Block`
brings the tables, the rows and the taps' spectra to shared memory, and `scratch_types` is where they lie.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.config import N1, TILE, Config
from pallas_kernels.fft_conv.mosaic import CHUNK, matrices


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a kernel is compiled for.

    Attributes:
      batch, channels, features: B, C and D.
      length: rows of X that hold the sequence, L / n2: a multiple of 8, at most 64.
      dtype: of u, the gates, the tables and the result: bfloat16 or float16.
      pre_gate: whether u is multiplied by a gate `(B, D, length, n2)` first.
      post_gates: 0 for none, 1 for a gate shared by the channels, C for a gate `(B, C, D, length, n2)`.
    """

    batch: int
    channels: int
    features: int
    length: int
    dtype: Any
    pre_gate: bool = False
    post_gates: int = 0

    def whole(self, config: Config) -> bool:
        """Whether every tile has all of its rows, and each of these all of its steps: one copy moves them then."""
        return self.length == N1 and self.batch % config.rows == 0

    def copies(self, config: Config) -> int:
        """That bring a tile's rows."""
        return 1 if self.whole(config) else config.rows


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which item and which rows a warpgroup works on at each step.

    An item is a spectrum of taps and a share of the batch: where there are fewer spectra than blocks, several blocks
    share one. A block visits items with the stride of the grid, and its warpgroups take turns at an item's tiles.
    """

    config: Config
    batch: int
    spectra: int

    @property
    def splits(self):
        tiles = pl.cdiv(self.batch, self.config.rows)
        return max(1, min(self.config.blocks // self.spectra, pl.cdiv(tiles, self.config.warpgroups)))

    @property
    def tiles(self):
        """Tiles of one item."""
        return pl.cdiv(pl.cdiv(self.batch, self.config.rows), self.splits)

    @property
    def items(self):
        return self.spectra * self.splits

    @property
    def grid(self):
        return min(self.config.blocks, self.items)

    @property
    def visits(self):
        """Items that a block works on; the last may not exist."""
        return pl.cdiv(self.items, self.grid)

    @property
    def rounds(self):
        """Steps that a warpgroup spends on one item."""
        return pl.cdiv(self.tiles, self.config.warpgroups)

    @property
    def steps(self):
        return self.visits * self.rounds

    def at(self, step):
        """(item, first row of the batch, whether there is any work) of this warpgroup at this step."""
        item = lax.axis_index("block") + (step // self.rounds) * self.grid
        tile = lax.rem(step, self.rounds) * self.config.warpgroups + lax.axis_index("warpgroup")
        row = (lax.rem(item, self.splits) * self.tiles + tile) * self.config.rows
        return item, row, (step < self.steps) & (item < self.items) & (tile < self.tiles) & (row < self.batch)


@dataclasses.dataclass(frozen=True)
class Block:
    """What every kernel does around the mathematics: tables, rows and spectra come in, warpgroups keep in step."""

    schedule: Schedule
    shapes: Shapes
    rows: Sequence[str]
    scratch: dict[str, Any]

    @property
    def config(self):
        return self.schedule.config

    @property
    def barriers(self):
        return self.scratch["barriers"]

    @property
    def group(self):
        return lax.axis_index("warpgroup")

    def load_tables(self, f1, f2, twiddle):
        @pl.when(self.group == 0)
        def _():
            for name, table in (("f1", f1), ("f2", f2), ("twiddle", twiddle)):
                for source, place in _pieces(table, self.scratch[name]):
                    plgpu.copy_gmem_to_smem(source, place, self.barriers["tables"])

        plgpu.barrier_wait(self.barriers["tables"])

    def clear(self, *names: str):
        """Zeroes the rows of X beyond the sequence, which TMA never writes."""
        if self.shapes.length == N1:
            return
        for name in names:
            for r in range(self.config.rows):
                self.scratch[name][self.group, r] = jnp.zeros((N1, self.config.n2), self.shapes.dtype)
        plgpu.commit_smem()

    def fetch(self, source, index: Callable[[Any], tuple], row, name: str):
        """Starts the copy of a tile's rows; a batch that ends inside it repeats its last row, which nobody stores."""
        if self.shapes.whole(self.config):
            rows = source.at[index(pl.ds(row, self.config.rows))]
            plgpu.copy_gmem_to_smem(rows, self.scratch[name].at[self.group], self._barrier(name))
            return
        for r in range(self.config.rows):
            plgpu.copy_gmem_to_smem(
                source.at[index(jnp.minimum(row + r, self.shapes.batch - 1))],
                self.scratch[name].at[self.group, r, pl.ds(0, self.shapes.length)],
                self._barrier(name),
            )

    def _barrier(self, name: str):
        return self.barriers["copies"].at[self.rows.index(name) * self.config.warpgroups + self.group]

    def await_rows(self, name: str):
        plgpu.barrier_wait(self._barrier(name))

    def tile(self, name: str, mine):
        """The rows of this warpgroup's tile in shared memory, of the staging both planes of each."""
        place = self.scratch[name].at[mine]
        by_plane = name == "staging" and len(place.shape) == 4
        return [place.at[:, r] if by_plane else place.at[r] for r in range(self.config.rows)]

    def fetch_spectrum(self, spectrum, item):
        schedule = self.schedule

        @pl.when((self.group == 0) & (item < schedule.items))
        def _():
            slot = lax.rem(item // schedule.grid, self.config.spectrum_slots)
            planes, arrivals = self.scratch["spectrum"].shape[1], self.shapes.copies(self.config)
            cuts = pl.cdiv(arrivals, planes)  # of a plane, so that there are enough copies for a barrier
            for place in range(planes * cuts):
                part = place // cuts, pl.ds(place % cuts * (N1 // cuts), N1 // cuts)
                plgpu.copy_gmem_to_smem(
                    spectrum.at[item // schedule.splits, *part],
                    self.scratch["spectrum"].at[slot, *part],
                    self._spectrum_barriers(slot)[place // arrivals],
                )

    def _spectrum_barriers(self, slot):
        each = _spectrum_barriers(self.config, self.shapes, self.scratch["spectrum"].shape[1])
        first = len(self.rows) * self.config.warpgroups + slot * each
        return [self.barriers["copies"].at[first + i] for i in range(each)]

    def begin_item(self, spectrum, item):
        """Waits for the item's spectrum and returns its slot; with a second slot, starts the next one's copy."""
        slots = self.config.spectrum_slots
        slot = lax.rem(item // self.schedule.grid, slots)

        @pl.when(item < self.schedule.items)
        def _():  # all are past the last item, so that its slot is free
            plgpu.barrier_arrive(self.barriers["done"])
            plgpu.barrier_wait(self.barriers["done"])
            self.fetch_spectrum(spectrum, item + (slots - 1) * self.schedule.grid)
            for barrier in self._spectrum_barriers(slot):
                plgpu.barrier_wait(barrier)

        return slot

    def store_plane(self, plane: int, mine, target: Callable[[Any], Any], row):
        """Starts the copy of a plane of the tile's staging to `target(batch rows)`."""
        if self.shapes.whole(self.config):
            plgpu.copy_smem_to_gmem(self.scratch["staging"].at[mine, plane], target(pl.ds(row, self.config.rows)))
        else:
            self.store([e.at[plane] for e in self.tile("staging", mine)], target, row)

    def store(self, rows, target: Callable[[Any], Any], row):
        """Starts the copy of a tile's rows in shared memory to `target(batch row)`."""
        for r, source in enumerate(rows):

            @pl.when(row + r < self.shapes.batch)
            def _(r=r, source=source):
                plgpu.copy_smem_to_gmem(source.at[pl.ds(0, self.shapes.length)], target(row + r))


def _pieces(table, place):
    """Pairs (source, place) of what a table is copied by: planes, or their blocks of columns."""
    for plane in range(place.shape[0]):
        if len(place.shape) == 3:
            yield table.at[plane], place.at[plane]
            continue
        _, blocks, _, columns = place.shape
        for block in range(blocks):
            yield table.at[plane, :, pl.ds(block * columns, columns)], place.at[plane, block]


def _spectrum_barriers(config: Config, shapes: Shapes, planes: int) -> int:
    """Of a slot."""
    return pl.cdiv(planes, shapes.copies(config))


def barriers(config: Config, shapes: Shapes, rows: int, planes: int, tables: int):
    """Those of `Block`, for so many sequences in tiles, planes of a spectrum, and copies of tables.

    What has arrived of each array of barriers takes a register all the while, so one array serves rows and spectra.
    """
    count = rows * config.warpgroups + config.spectrum_slots * _spectrum_barriers(config, shapes, planes)
    return {
        "tables": plgpu.Barrier(num_arrivals=tables),
        "done": plgpu.Barrier(num_arrivals=config.warpgroups),
        "copies": plgpu.Barrier(num_arrivals=shapes.copies(config), num_barriers=count),
    }


def scratch_types(
    config: Config, shapes: Shapes, rows: Sequence[str], channels: int, f1_in_blocks: bool = False, **more
):
    """Shared memory and barriers: `rows` names the tiles that are copied in; `channels` spectra belong to an item."""
    n2, groups, dtype = config.n2, config.warpgroups, shapes.dtype
    f1_shape: tuple[int, ...] = (2 if n2 == TILE else 4, N1, N1)
    if f1_in_blocks and n2 < TILE:  # as wide as the rows, whose addresses they share
        f1_shape = f1_shape[0], N1 // n2, N1, n2
    f2_shape = column_dft.blocks_shape(n2) if n2 in column_dft.POINTS else (2, n2, 2 * n2)
    tables = math.prod(f1_shape[:-2]) + f2_shape[0] + 2
    return dict(
        f1=matrices(f1_shape, dtype, columns=n2),
        f2=matrices(f2_shape, dtype, columns=min(n2, f2_shape[-1] // 2)),
        twiddle=matrices((2, N1, n2), dtype, columns=CHUNK),
        spectrum=matrices((config.spectrum_slots, 2 * channels, N1, n2), dtype, columns=CHUNK),
        staging=matrices((groups, 2, config.rows, N1, n2), dtype),
        **{name: matrices((groups, config.rows, N1, n2), dtype) for name in rows},
        **more,
        barriers=barriers(config, shapes, len(rows), 2 * channels, tables),
    )
