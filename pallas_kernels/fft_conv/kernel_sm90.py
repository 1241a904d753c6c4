"""Kernel bodies for Hopper: the right-angle butterfly convolution in one launch, through Mosaic GPU.

One row of a sequence is a 64 x n2 matrix X, its transform of n = 64 n2 complex points is two matrix products with an
elementwise twiddle between them, and the convolution is that chain, a product with the taps' spectrum K, and the chain
backwards (`tables` defines F1, F2 and T):

    A = F1 X                 left product, X real, from shared memory
    B = A * T                registers
    C = B F2                 right product, B straight from the registers
    D = conj(C * K)          registers
    G = D F2                 right product
    E = G * T                registers to shared memory: the one round trip of the intermediate
    Y = Re(F1)' Re(E) - Im(F1)' Im(E)      left product

From 32 columns on, the right products are taken by radix 2 or 4 in registers and then by blocks of 16 points
(`column_dft`), which leaves them half or a quarter of their work. Conjugating once, at D, lets the way back use the
forward tables: nothing is transposed or stored twice. Each warpgroup carries its own tile (64 x 64 complex points: one
row of 4096, two of 2048 or four of 1024 side by side) through the whole chain, so that while one waits for the tensor
cores the others do the elementwise work. Rows of a tile never mix, so a NaN stays in its row. A block is persistent: it
visits channels with the stride of the grid, and the tables stay.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.config import N1, TILE, Config
from pallas_kernels.fft_conv.mosaic import (
    CHUNK,
    F32,
    by_columns,
    complex_planes,
    load,
    matrices,
    persistent_kernel,
    sums_of_products,
)
from pallas_kernels.fft_conv.widening import widened


def _float(*arrays):
    return tuple(map(widened, arrays))


def _joined(plane):
    """A matrix in shared memory, whole or by blocks of columns `(blocks, rows, columns)`, in registers."""
    if len(plane.shape) == 2:
        return load(plane)
    return lax.concatenate([load(plane.at[block]) for block in range(plane.shape[0])], 1)


def _gated(x, gate, dtype):
    (product,) = by_columns(lambda a, b: ((widened(a) * widened(b)).astype(dtype),), x, gate)
    return product


def _times(z, w, dtype):
    """The complex product of (real, imaginary) pairs, computed in float32."""

    def times(a, b, c, d):
        a, b, c, d = _float(a, b, c, d)
        return (a * c - b * d).astype(dtype), (a * d + b * c).astype(dtype)

    return by_columns(times, *z, *w)


def _conj_times(z, w, dtype):
    """conj(z w)."""

    def times(a, b, c, d):
        a, b, c, d = _float(a, b, c, d)
        return (a * c - b * d).astype(dtype), (-(a * d) - b * c).astype(dtype)

    return by_columns(times, *z, *w)


@dataclasses.dataclass(frozen=True)
class _Butterfly:
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

    def _first_block(self, transposed: bool = False):
        """Both parts of F1. A narrow row's product would spend itself in reading F1 again from shared memory."""
        if self.twiddle.shape[-1] == TILE:
            return tuple(plane.T if transposed else plane for plane in complex_planes(self.f1, self.fresh()))
        return tuple(map(_joined, complex_planes(self.f1, self.fresh() + 2 * transposed)))

    def _right(self, tiles):
        """Z F2 for each z, as [Re z | Im z] times [[Re F2, Im F2], [-Im F2, Re F2]]."""
        n2 = self.f2.shape[-2]
        top, bottom = complex_planes(self.f2, self.fresh())
        sums = sums_of_products(*([(re, top), (im, bottom)] for re, im in tiles))
        return [(both[:, :n2], both[:, n2:]) for both in sums]

    def first(self, rows):
        """A for each of some real rows in shared memory."""
        sums = sums_of_products(*([(f1, row)] for row in rows for f1 in self._first_block()))
        return list(zip(sums[::2], sums[1::2], strict=True))

    def _second(self, tiles):
        """C for each A."""
        twiddle = complex_planes(self.twiddle, self.fresh())
        return self._right([_times(z, twiddle, self.f1.dtype) for z in tiles])

    def _second_back(self, tiles, then):
        """E for each D; `then` runs before the first."""
        results = self._right(tiles)
        twiddle = complex_planes(self.twiddle, self.fresh())
        then()
        return (_conj_times(z, twiddle, self.f1.dtype) for z in results)

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
        re, im = self._first_block(transposed=True)
        return sums_of_products(*([(re, e.at[0]), (im, e.at[1])] for e in scratch))


@dataclasses.dataclass(frozen=True)
class ByColumns(_Butterfly):
    """The chain whose second block is that of `column_dft`."""

    # Products at once. Results come as they are asked for: what becomes of a row takes fewer registers than its C.
    together: int = column_dft.PAIR

    def _operands(self, back: bool):
        twiddle, table = complex_planes(self.twiddle, self.fresh()), column_dft.half(self.f2, self.fresh(), back)
        return twiddle, table, self.f1.dtype, self.together

    def second(self, tiles):
        """Yields C of each A, 16 columns of it at a time."""
        return column_dft.there(tiles, *self._operands(back=False))

    def _second(self, tiles):
        return column_dft.joined(tiles, self.second(tiles))

    def _second_back(self, tiles, then):
        then()
        return column_dft.back(tiles, *self._operands(back=True))


def butterfly(config: Config, scratch, fresh: Callable[[], Any]) -> _Butterfly:
    """The chain over the tables in shared memory, of whichever kind they are."""
    if config.n2 not in column_dft.POINTS:
        return _Butterfly.over(scratch, fresh)
    together = 4 if config.n2 == 32 and config.warpgroups < 4 else column_dft.PAIR
    return dataclasses.replace(ByColumns.over(scratch, fresh), together=together)


def _zeros(step, shift_by):
    """A function that returns zero, at every call another one as far as the compiler can tell.

    A tile's work that reads a table several times would otherwise keep its addresses in registers all the while.
    """
    calls = itertools.count()
    return lambda: lax.shift_right_logical(step + next(calls), shift_by)


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
class _Schedule:
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
class _Block:
    """What every kernel does around the mathematics: tables, rows and spectra come in, warpgroups keep in step."""

    schedule: _Schedule
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
    """Those of `_Block`, for so many sequences in tiles, planes of a spectrum, and copies of tables.

    What has arrived of each array of barriers takes a register all the while, so one array serves rows and spectra.
    """
    count = rows * config.warpgroups + config.spectrum_slots * _spectrum_barriers(config, shapes, planes)
    return {
        "tables": plgpu.Barrier(num_arrivals=tables),
        "done": plgpu.Barrier(num_arrivals=config.warpgroups),
        "copies": plgpu.Barrier(num_arrivals=shapes.copies(config), num_barriers=count),
    }


def _scratch(config: Config, shapes: Shapes, rows: Sequence[str], channels: int, f1_in_blocks: bool = False, **more):
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


def forward(config: Config, shapes: Shapes):
    """The kernel (u, pre gate or None, post gate or None, spectrum, f1, f2, twiddle, [31]) -> y.

    u is `(B, D, length, n2)`, the spectrum of the taps `(D, 2 C, 64, n2)`, y `(B, C, D, length, n2)`.
    """
    channels, dtype = shapes.channels, shapes.dtype
    schedule = _Schedule(config, shapes.batch, shapes.features)
    names = ["u", *["gate"] * (shapes.pre_gate or shapes.post_gates > 0)]

    def fft_conv_forward(u, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, out, scratch):
        block = _Block(schedule, shapes, names, scratch)
        kept_shift = shift[0]
        block.clear(*names)

        def shift_by():
            """Read again at each use where that alone leaves every tile's work without spilled registers."""
            return shift[0] if shapes.whole(config) else kept_shift

        def fetch_rows(step, source, name):
            item, row, work = schedule.at(step)

            @pl.when(work)
            def _():
                block.fetch(source, lambda b: (b, item // schedule.splits), row, name)

        def fetch_pre_gate(step):  # the two gates share a tile: the next row's comes after this row's post gate
            if shapes.pre_gate:
                fetch_rows(step, pre_gate, "gate")

        fetch_rows(jnp.int32(0), u, "u")
        fetch_pre_gate(jnp.int32(0))
        for ahead in range(config.spectrum_slots - 1):
            block.fetch_spectrum(spectrum, lax.axis_index("block") + ahead * schedule.grid)
        block.load_tables(f1, f2, twiddle)

        @pl.loop(0, schedule.visits)
        def _(visit):
            slot = block.begin_item(spectrum, lax.axis_index("block") + visit * schedule.grid)

            @pl.loop(0, schedule.rounds)
            def _(turn):
                step = visit * schedule.rounds + turn
                item, row, work = schedule.at(step)
                feature = item // schedule.splits

                @pl.when(work)
                def _():
                    def same_zero(number):
                        zero = lax.shift_right_logical(number, shift_by())
                        return lambda: zero

                    def tile(name, fresh):
                        return block.tile(name, block.group + fresh())

                    fresh = same_zero(step)
                    block.await_rows("u")
                    if shapes.pre_gate:
                        block.await_rows("gate")
                        for x, gate in zip(tile("u", fresh), tile("gate", fresh), strict=True):
                            x[...] = _gated(load(x), load(gate), dtype)
                        plgpu.commit_smem()
                    chain = butterfly(config, scratch, fresh)

                    def fetch_next():
                        plgpu.commit_smem()  # the whole warpgroup has read its rows
                        fetch_rows(step + 1, u, "u")

                    spectra = chain.forward(tile("u", fresh), then=fetch_next)

                    def convolve(channel, spectra, fresh):
                        if shapes.post_gates:
                            gate = channel if shapes.post_gates > 1 else 0
                            block.fetch(post_gate, lambda b: (b, gate, feature), row, "gate")
                        taps = complex_planes(scratch["spectrum"].at[slot], 2 * channel + fresh())
                        products = [_conj_times(z, taps, dtype) for z in spectra]
                        ys = butterfly(config, scratch, fresh).inverse(products, tile("staging", fresh))
                        if shapes.post_gates:
                            block.await_rows("gate")
                            ys = [_gated(y, load(gate), dtype) for y, gate in zip(ys, tile("gate", fresh), strict=True)]
                        staging = tile("staging", fresh)
                        plgpu.commit_smem()  # the whole warpgroup has read what the results replace
                        for e, y in zip(staging, ys, strict=True):
                            e[0] = y.astype(dtype)
                        plgpu.commit_smem()
                        block.store_plane(0, block.group + fresh(), lambda b: out.at[b, channel, feature], row)

                    if channels == 1:
                        # A gate's address takes registers too: with one, those of the tables are not kept.
                        convolve(0, spectra, same_zero(step + 1) if "gate" in names else fresh)
                        fetch_pre_gate(step + 1)
                        return
                    for z, kept in zip(spectra, tile("spectra", fresh), strict=True):
                        kept[0], kept[1] = (part.astype(dtype) for part in z)

                    @pl.loop(0, channels)
                    def _(channel):
                        fresh = same_zero(step + channel)
                        kept = [complex_planes(z, 0) for z in tile("spectra", fresh)]
                        convolve(channel, kept, fresh)

                    fetch_pre_gate(step + 1)

                @pl.when(jnp.logical_not(work))
                def _():
                    fetch_rows(step + 1, u, "u")
                    fetch_pre_gate(step + 1)

        plgpu.wait_smem_to_gmem(0)

    complex_tiles = (config.warpgroups, config.rows, 2, N1, config.n2)
    more = {"spectra": matrices(complex_tiles, dtype, columns=CHUNK)} if channels > 1 else {}
    # Rows that are copied one by one take registers, which F1 in blocks gives back; others would compile worse with it.
    scratch = _scratch(config, shapes, names, channels, not shapes.whole(config), **more)
    out = jax.ShapeDtypeStruct((shapes.batch, channels, shapes.features, shapes.length, config.n2), dtype)
    return persistent_kernel(fft_conv_forward, out, scratch, schedule.grid, config.warpgroups)


def _correlate(a, b, c, d, re, im):
    """(re, im) + conj(a + ib) (c + id)."""
    a, b = _float(a, b)
    return re + a * c + b * d, im + a * d - b * c


def _conj_correlate(dtype, a, b, c, d):
    """conj(conj(a + ib) (c + id))."""
    a, b = _float(a, b)
    return (a * c + b * d).astype(dtype), (b * c - a * d).astype(dtype)


def backward(config: Config, shapes: Shapes):
    """The kernel (u, pre gate or None, post gate or None, g, spectrum, f1, f2, twiddle, [31]) -> (du, ..., ds).

    It gives the cotangents of y = post (K * (pre u)) for that of y, g, `(B, C, D, length, n2)`. With x = pre u,
    h = post g and their spectra X and H, recomputed so that nothing but the arguments need be kept for it,

        dx = Re F^-1(conj(K) H),   du = pre dx,   dpre = u dx,   dpost = g Re F^-1(K X),   ds = sum_b conj(X) H

    in that order; the cotangent of a gate that is not there is left out. All but ds have the shape of g, each channel's
    share; ds is `(parts, D, 2 C, 64, n2)` in float32, to be summed over the parts that the warpgroups kept, each in its
    registers. An item is a feature and a channel.

    Each of the sequences has a tile in shared memory, which the next row's is copied to as soon as this row needs it no
    more: h takes the place of the post gate, x a plane of the staging.
    """
    channels, dtype, n2 = shapes.channels, shapes.dtype, config.n2
    pre, post = shapes.pre_gate, shapes.post_gates > 0
    schedule = _Schedule(config, shapes.batch, shapes.features * channels)
    groups = config.warpgroups
    names = ["u", *["pre_gate"] * pre, *["post_gate"] * post, "g"]

    def fft_conv_backward(u, pre_gate, post_gate, g, spectrum, f1, f2, twiddle, shift, du, *more, scratch):
        *d_gates, ds = more
        sources = {"u": u, "pre_gate": pre_gate, "post_gate": post_gate, "g": g}
        block = _Block(schedule, shapes, names, scratch)
        shift_by = shift[0]
        block.clear(*names)

        def place(item):
            spectra = item // schedule.splits
            return spectra // channels, lax.rem(spectra, channels)

        def fetch_rows(step, *names):
            item, row, work = schedule.at(step)
            feature, channel = place(item)

            def index(name):
                if name == "g":
                    return lambda b: (b, channel, feature)
                if name == "post_gate":
                    return lambda b: (b, channel if shapes.post_gates > 1 else 0, feature)
                return lambda b: (b, feature)

            @pl.when(work)
            def _():
                for name in names:
                    block.fetch(sources[name], index(name), row, name)

        fetch_rows(jnp.int32(0), *names)
        for ahead in range(config.spectrum_slots - 1):
            block.fetch_spectrum(spectrum, lax.axis_index("block") + ahead * schedule.grid)
        block.load_tables(f1, f2, twiddle)

        @pl.loop(0, schedule.visits)
        def _(visit):
            this = lax.axis_index("block") + visit * schedule.grid
            slot = block.begin_item(spectrum, this)

            def turn(turn, ds):
                step = visit * schedule.rounds + turn
                work = schedule.at(step)[-1]

                def tile(ds):
                    zero = _zeros(step, shift_by)

                    def rows(name):
                        return block.tile(name, block.group + zero())

                    def staging(plane):
                        return [e.at[plane] for e in rows("staging")]

                    def chain():
                        now = zero()
                        return butterfly(config, scratch, lambda: now)

                    def taps():
                        return complex_planes(scratch["spectrum"].at[slot], zero())

                    def kept():
                        return [complex_planes(z, 0) for z in rows("spectra")]

                    def fetch_next(name):
                        fetch_rows(step + 1 + zero(), name)

                    def spectra(read, then_fetch=None):
                        """Of rows in shared memory, whose place the next ones may then take."""
                        results = chain().forward(read)
                        if then_fetch:
                            plgpu.commit_smem()  # the whole warpgroup has read them
                            fetch_next(then_fetch)
                        return results

                    def inverse(products):
                        results = chain().inverse(products, rows("staging"))
                        plgpu.commit_smem()  # the whole warpgroup has read what the results replace
                        return results

                    def gate(name, gate_name, products):
                        """Rounded as the forward kernel does."""
                        block.await_rows(name)
                        block.await_rows(gate_name)
                        for x, y, product in zip(rows(name), rows(gate_name), products, strict=True):
                            product[...] = _gated(load(x), load(y), dtype)
                        plgpu.commit_smem()
                        return products

                    def store(plane, results, target, factor=None):
                        """Starts the copy of results, times the rows of that name, through a plane of the staging."""
                        factors = map(load, rows(factor)) if factor else [None] * config.rows
                        for e, result, x in zip(staging(plane), results, factors, strict=True):
                            e[...] = result.astype(dtype) if x is None else _gated(result, x, dtype)
                        plgpu.commit_smem()
                        item, row, _ = schedule.at(step + zero())
                        feature, channel = place(item)
                        mine = block.group + zero()
                        block.store_plane(plane, mine, lambda b: target.at[b, channel, feature], row)

                    if pre:
                        if not post:  # or else the last result in this plane has left before the inverse of K X
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        xs = spectra(gate("u", "pre_gate", staging(1)))
                    else:
                        block.await_rows("u")
                        xs = spectra(rows("u"), "u")
                    for z, (re, im) in zip(xs, kept(), strict=True):  # registers are short while H is made
                        re[...], im[...] = (part.astype(dtype) for part in z)

                    if post:
                        hs = spectra(gate("g", "post_gate", rows("post_gate")), "post_gate")
                    else:
                        block.await_rows("g")
                        hs = spectra(rows("g"), "g")

                    products = []
                    for r, (z, w) in enumerate(zip(kept(), hs, strict=True)):
                        # A branch, though the first row always counts: ptxas would put these sums, which only the
                        # next tile needs, off to the end of this one and spill what it kept for them, up to 300 bytes.
                        counts = schedule.at(step + zero())[1] + r < shapes.batch
                        ds = lax.cond(
                            counts, lambda ds, z=z, w=w: by_columns(_correlate, *z, *w, *ds), lambda ds: ds, ds
                        )
                        products.append(by_columns(functools.partial(_conj_correlate, dtype), *taps(), *w))
                    dxs = inverse(products)
                    store(0, dxs, du, "pre_gate" if pre else None)
                    if pre:
                        store(1, dxs, d_gates[0], "u")
                        fetch_next("u")
                        fetch_next("pre_gate")

                    if post:
                        products = [_conj_times(z, taps(), dtype) for z in kept()]
                        store(0, inverse(products), d_gates[-1], "g")
                        fetch_next("g")
                    return ds

                def rest(ds):
                    fetch_rows(step + 1, *names)
                    return ds

                return lax.cond(work, tile, rest, ds)

            nothing = plgpu.layout_cast(jnp.zeros((N1, n2), F32), plgpu.Layout.WGMMA)
            ds_re, ds_im = lax.fori_loop(0, schedule.rounds, turn, (nothing, nothing))

            @pl.when(this < schedule.items)
            def _():
                feature, channel = place(this)
                part = lax.rem(this, schedule.splits) * groups + block.group
                ds[part, feature, 2 * channel] = ds_re
                ds[part, feature, 2 * channel + 1] = ds_im

        plgpu.wait_smem_to_gmem(0)

    share = jax.ShapeDtypeStruct((shapes.batch, channels, shapes.features, shapes.length, n2), dtype)
    parts = jax.ShapeDtypeStruct((schedule.splits * groups, shapes.features, 2 * channels, N1, n2), F32)
    spectra = matrices((groups, config.rows, 2, N1, n2), dtype, columns=CHUNK)
    scratch = _scratch(config, shapes, names, 1, spectra=spectra)
    out = (share,) * (1 + pre + post) + (parts,)
    return persistent_kernel(fft_conv_backward, out, scratch, schedule.grid, config.warpgroups)
