"""Kernels for Hopper and sequences of two to four blocks of 4096 steps: one launch, everything else on chip.

A long convolution is a Toeplitz matrix of blocks. Each block is one too, of 2 * 4096 - 1 lags, and what the
right-angle transform of 4096 points multiplies by is just such a block (`tables`). So with X_j and Y_m the spectra of
blocks of u and of the result

    Y_m = sum_j K_(m-j) X_j

where K_l is the spectrum of the taps from lag 4096 (l - 1) + 1 to 4096 (l + 1) - 1. No zeros are transformed, any
number of blocks will do, and the tables are those of 4096 steps. It costs (J + 1) / 2 complex products for each of J
blocks instead of one, all on chip.

A warpgroup transforms one block (`kernel_sm90` has the chain), and a team of J keeps its spectra in shared memory,
where each warpgroup then does the products of its share of the columns, in place, for all blocks at once: every
spectrum is read once. Rows of the batch never mix.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.config import N1, SHARED_MEMORY_BYTES, TILE
from pallas_kernels.fft_conv.kernel_sm90 import _Butterfly, _float, _gated, _times
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, complex_planes, load, matrices, sums_of_products

_STEP = 8


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a kernel is compiled for.

    Attributes:
      batch, channels, features: B, C and D.
      length: rows of 64 that hold the sequence: a multiple of 8, from 65 to 256.
      lags: first and last lag of the blocks of taps, such as (0, J - 1) for a causal convolution.
      dtype: of u, the gates, the tables and the result: bfloat16 or float16.
      sequences: 1 if the channels share u, C if each has its own.
      pre_gates: gates that u is multiplied by first: 0 for none, 1 shared by the channels, C for one of each.
      post_gates: gates of the result, likewise.
      blocks: in the persistent grid.
    """

    batch: int
    channels: int
    features: int
    length: int
    lags: tuple[int, int]
    dtype: Any
    sequences: int = 1
    pre_gates: int = 0
    post_gates: int = 0
    blocks: int = 132

    @property
    def count(self) -> int:
        """Blocks of a sequence."""
        return pl.cdiv(self.length, N1)

    @property
    def team(self) -> int:
        """Warpgroups that work on a row."""
        return 2 if self.count == 2 else 4

    @property
    def teams(self) -> int:
        return 4 // self.team

    @property
    def most_lags(self) -> int:
        """Spectra of the taps that fit in shared memory: a convolution with more of them takes several launches."""
        tables, matrix = 64 * 1024, 2 * N1 * TILE
        rest = SHARED_MEMORY_BYTES - tables - matrix * (2 * self.teams * self.count + self.team * self.teams)
        return rest // (2 * matrix)

    @property
    def lag_range(self) -> range:
        return range(self.lags[0], self.lags[1] + 1)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """Which item and which row a team works on at each step; an item is a spectrum of taps and a share of the batch."""

    shapes: Shapes

    @property
    def spectra(self):
        return self.shapes.features * self.shapes.channels

    @property
    def splits(self):
        return max(1, min(self.shapes.blocks // self.spectra, pl.cdiv(self.shapes.batch, self.shapes.teams)))

    @property
    def rows(self):
        """Rows of one item."""
        return pl.cdiv(self.shapes.batch, self.splits)

    @property
    def items(self):
        return self.spectra * self.splits

    @property
    def grid(self):
        return min(self.shapes.blocks, self.items)

    @property
    def rounds(self):
        """Steps that a team spends on one item."""
        return pl.cdiv(self.rows, self.shapes.teams)

    @property
    def steps(self):
        return pl.cdiv(self.items, self.grid) * self.rounds

    def at(self, step, team):
        """(item, row of the batch, whether there is any work) of a team at this step."""
        item = lax.axis_index("block") + (step // self.rounds) * self.grid
        turn = lax.rem(step, self.rounds) * self.shapes.teams + team
        row = lax.rem(item, self.splits) * self.rows + turn
        return item, row, (step < self.steps) & (item < self.items) & (turn < self.rows) & (row < self.shapes.batch)

    def place(self, item):
        """(channel, feature) of an item."""
        spectrum = item // self.splits
        return lax.rem(spectrum, self.shapes.channels), spectrum // self.shapes.channels


class _FreshZeros(_Butterfly):
    """A butterfly that reads each table at a zero of its own, so that none is kept in a register for the next."""

    fresh: Callable[[], Any]

    def __init__(self, scratch, fresh):
        for name in ("f1", "f2", "twiddle"):
            object.__setattr__(self, name, scratch[name])
        object.__setattr__(self, "fresh", fresh)

    @property
    def zero(self):
        return self.fresh()

    @zero.setter
    def zero(self, _):
        raise AttributeError


def forward(shapes: Shapes):
    """The kernel (u, pre gate, post gate, spectrum, f1, f2, twiddle, [31]) -> y.

    u is `(B, 1 or C, D, length, 64)`, the spectrum of the taps `(D, C, lags, 2, 64, 64)`, y `(B, C, D, length, 64)`. An
    absent gate is not read.
    """
    schedule = _Schedule(shapes)
    dtype, count, team_size, teams = shapes.dtype, shapes.count, shapes.team, shapes.teams
    lags = shapes.lag_range
    groups = team_size * teams
    gated = shapes.pre_gates + shapes.post_gates > 0
    chunks = TILE // CHUNK // team_size

    def fft_conv_blocked_forward(u, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, out, scratch):
        shift_by = shift[0]
        group = lax.axis_index("warpgroup")
        team, member = (0, group) if teams == 1 else (group // team_size, lax.rem(group, team_size))
        barriers = scratch["barriers"]

        def when_block(do):
            """`do()`, if this warpgroup has a block."""
            if count == team_size:
                do()
            else:
                pl.when(member < count)(do)

        def block_rows(zero):
            """Of u and y. TMA reads zeros beyond the sequence, and writes nothing there."""
            return pl.ds(pl.multiple_of((member + zero) * N1, N1), N1)

        def inbox(zero):
            return scratch["inbox"].at[group + zero]

        def slot(zero):
            return scratch["slots"].at[group + zero]

        def fetch(step, source, sequences, target, barrier, zero):
            """Starts the copy of this warpgroup's block at a step; `sequences` is 1 or C."""
            item, row, work = schedule.at(step + zero, team)
            channel, feature = schedule.place(item)

            @pl.when(work if count == team_size else work & (member < count))
            def _():
                plgpu.copy_gmem_to_smem(
                    source.at[row, channel if sequences > 1 else 0, feature, block_rows(zero)],
                    target,
                    barriers["arrived"].at[barrier * groups + group + zero],
                )

        def fetch_u(step, zero):
            if not gated:
                fetch(step, u, shapes.sequences, inbox(zero), 0, zero)
                return
            fetch(step, u, shapes.sequences, slot(zero).at[0], 0, zero)
            if shapes.pre_gates:
                fetch(step, pre_gate, shapes.pre_gates, inbox(zero), 1, zero)

        fetch_u(jnp.int32(0), 0)

        @pl.when(group == 0)
        def _():
            for name, table in (("f1", f1), ("f2", f2), ("twiddle", twiddle)):
                for plane in range(2):
                    plgpu.copy_gmem_to_smem(table.at[plane], scratch[name].at[plane], barriers["tables"])

        plgpu.barrier_wait(barriers["tables"])

        def meet(zero):
            plgpu.barrier_arrive(barriers["team"].at[team + zero])
            plgpu.barrier_wait(barriers["team"].at[team + zero])

        @pl.loop(0, schedule.steps)
        def _(step):
            item, _row, work = schedule.at(step, team)
            first = (lax.rem(step, schedule.rounds) == 0) & (item < schedule.items)
            zeros = iter(range(1000))

            def fresh():
                return lax.shift_right_logical(step + next(zeros), shift_by)

            butterfly = _FreshZeros(scratch, fresh)

            @pl.when(first)
            def _():
                if teams > 1:  # a team is past the last item, whose spectrum may go, once it has met: here, both are
                    plgpu.barrier_arrive(barriers["done"])
                    plgpu.barrier_wait(barriers["done"])

                @pl.when(group == 0)
                def _():
                    channel, feature = schedule.place(item)
                    for lag in range(len(lags)):
                        for plane in (0, 1):
                            plgpu.copy_gmem_to_smem(
                                spectrum.at[feature, channel, lag, plane],
                                scratch["taps"].at[lag, plane],
                                barriers["taps"],
                            )

            @pl.when(work)
            def _():
                @when_block
                def _():
                    zero = fresh()
                    plgpu.barrier_wait(barriers["arrived"].at[group + zero])
                    x = inbox(zero)
                    if gated:
                        x = slot(zero).at[0]
                        if shapes.pre_gates:
                            plgpu.barrier_wait(barriers["arrived"].at[groups + group + zero])
                            x[...] = _gated(load(x), load(inbox(zero)), dtype)
                            plgpu.commit_smem()

                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left the slot
                    a = sums_of_products(*([(f1, x)] for f1 in complex_planes(scratch["f1"], fresh())))
                    b = _times(a, complex_planes(scratch["twiddle"], fresh()), dtype)
                    # One plane after the other: both, B and the rest need more than 128 registers.
                    for plane in (0, 1):
                        top, bottom = complex_planes(scratch["f2"].at[:, :, pl.ds(plane * TILE, TILE)], fresh())
                        (part,) = sums_of_products([(b[0], top), (b[1], bottom)])
                        slot(fresh()).at[plane][...] = part.astype(dtype)
                    plgpu.commit_smem()  # the whole warpgroup has read the inbox
                    if not gated:
                        fetch_u(step + 1, fresh())
                    elif shapes.post_gates:
                        fetch(step, post_gate, shapes.post_gates, inbox(fresh()), 1, fresh())

            @pl.when(first)
            def _():
                plgpu.barrier_wait(barriers["taps"])

            @pl.when(work)
            def _():
                meet(fresh())
                for i in range(chunks):
                    zero = fresh()
                    columns = pl.ds(pl.multiple_of((i * team_size + member + zero) * CHUNK, CHUNK), CHUNK)
                    spectra = [scratch["slots"].at[team * count + j + zero] for j in range(count)]
                    xs = [[load(planes.at[plane, :, columns]) for plane in (0, 1)] for planes in spectra]
                    ks = [
                        [load(scratch["taps"].at[lag + zero, plane, :, columns]) for plane in (0, 1)]
                        for lag in range(len(lags))
                    ]
                    ys = _block_products(xs, ks, shapes)
                    for planes, y in zip(spectra, ys, strict=True):
                        for plane in (0, 1):
                            planes.at[plane, :, columns][...] = y[plane]
                meet(fresh())

                @when_block
                def _():
                    mine = slot(fresh())
                    (y,) = butterfly.inverse([(load(mine.at[0]), load(mine.at[1]))], [mine])
                    zero = fresh()
                    mine = slot(zero)
                    if shapes.post_gates:
                        plgpu.barrier_wait(barriers["arrived"].at[groups + group + zero])
                        y = _gated(y, load(inbox(zero)), dtype)
                    plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
                    mine[1] = y.astype(dtype)
                    plgpu.commit_smem()

                    item, row, _ = schedule.at(step + zero, team)
                    channel, feature = schedule.place(item)
                    plgpu.copy_smem_to_gmem(mine.at[1], out.at[row, channel, feature, block_rows(zero)])
                    if gated:
                        fetch_u(step + 1, fresh())

            @pl.when(jnp.logical_not(work))
            def _():
                fetch_u(step + 1, fresh())

        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "f1": matrices((2, N1, N1), dtype, columns=CHUNK),
        "f2": matrices((2, TILE, 2 * TILE), dtype, columns=TILE),
        "twiddle": matrices((2, N1, TILE), dtype, columns=CHUNK),
        "taps": matrices((len(lags), 2, N1, TILE), dtype, columns=CHUNK),
        "slots": matrices((teams * count, 2, N1, TILE), dtype, columns=CHUNK),
        "inbox": matrices((groups, N1, TILE), dtype, columns=CHUNK),
        "barriers": dict(
            tables=plgpu.Barrier(num_arrivals=6),
            taps=plgpu.Barrier(num_arrivals=2 * len(lags)),
            arrived=plgpu.Barrier(num_arrivals=1, num_barriers=2 * groups if gated else groups),
            team=plgpu.Barrier(num_arrivals=team_size, num_barriers=teams),
            **({"done": plgpu.Barrier(num_arrivals=groups)} if teams > 1 else {}),
        ),
    }
    return plgpu.kernel(
        fft_conv_blocked_forward,
        out_type=jax.ShapeDtypeStruct((shapes.batch, shapes.channels, shapes.features, shapes.length, TILE), dtype),
        scratch_types={"scratch": scratch},
        grid=(schedule.grid,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="warpgroup",
        # Stores and reads of one matrix are of the same elements in each thread, or a commit or a barrier lies between.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )


def taps_gradient(shapes: Shapes):
    """The kernel (u, g, pre gate, post gate, f1, f2, twiddle, [31]) -> ds: the cotangent of spectra.

    u is `(B, 1 or C, D, length, 64)`, g, the cotangent of the result, `(B, C, D, length, 64)`, and ds
    `(parts, D, C, lags, 2, 64, 64)` in float32, to be summed over its parts:

        ds_l = sum over rows and m of conj(X_(m-l)) G_m

    A block of the grid adds up its item's rows in the result itself, 16 columns a warpgroup: for four lags that is
    128 KB, more than is left on chip, but at home in L2 while the block works on it.
    """
    schedule = _Schedule(shapes)
    dtype, count, team_size, teams = shapes.dtype, shapes.count, shapes.team, shapes.teams
    lags = shapes.lag_range
    groups = team_size * teams
    gated = shapes.pre_gates + shapes.post_gates > 0

    def fft_conv_blocked_taps_gradient(u, g, pre_gate, post_gate, f1, f2, twiddle, shift, ds, scratch):
        shift_by = shift[0]
        group = lax.axis_index("warpgroup")
        team, member = (0, group) if teams == 1 else (group // team_size, lax.rem(group, team_size))
        barriers = scratch["barriers"]

        def with_block(work):
            return work if count == team_size else work & (member < count)

        def block_rows(zero):
            """Of u and g. TMA reads zeros beyond the sequence."""
            return pl.ds(pl.multiple_of((member + zero) * N1, N1), N1)

        def plane(which, part, zero):
            """Of the spectrum of this warpgroup's block of u (0) or g (1)."""
            return scratch["planes"].at[(which * groups + group) * 2 + part + zero]

        def inbox(zero):
            return scratch["planes"].at[4 * groups + group + zero]

        def fetch(step, source, sequences, target, barrier, zero):
            item, row, work = schedule.at(step + zero, team)
            channel, feature = schedule.place(item)

            @pl.when(with_block(work))
            def _():
                plgpu.copy_gmem_to_smem(
                    source.at[
                        row,
                        channel if sequences > 1 else 0,
                        feature,
                        pl.ds(pl.multiple_of((member + zero) * N1, N1), N1),
                    ],
                    target,
                    barriers["arrived"].at[barrier * groups + group + zero],
                )

        def fetch_u(step, zero):
            fetch(step, u, shapes.sequences, plane(0, 0, zero) if gated else inbox(zero), 0, zero)
            if shapes.pre_gates:
                fetch(step, pre_gate, shapes.pre_gates, inbox(zero), 2, zero)

        fetch_u(jnp.int32(0), 0)

        @pl.when(group == 0)
        def _():
            for name, table in (("f1", f1), ("f2", f2), ("twiddle", twiddle)):
                for plane in range(2):
                    plgpu.copy_gmem_to_smem(table.at[plane], scratch[name].at[plane], barriers["tables"])

        plgpu.barrier_wait(barriers["tables"])

        def meet(zero):
            plgpu.barrier_arrive(barriers["all"].at[zero])
            plgpu.barrier_wait(barriers["all"].at[zero])

        @pl.loop(0, schedule.steps)
        def _(step):
            (item, *_row, work), any_work = schedule.at(step, team), schedule.at(step, 0)[-1]
            zeros = iter(range(1000))

            def fresh(turn=0):
                return lax.shift_right_logical(step + turn + next(zeros), shift_by)

            def transform(which):
                plgpu.barrier_wait(barriers["arrived"].at[which * groups + group + fresh(which)])
                if gated:
                    x = plane(which, 0, fresh(which))

                    def multiply(x=x):
                        plgpu.barrier_wait(barriers["arrived"].at[(2 + which) * groups + group + fresh(which)])
                        x[...] = _gated(load(x), load(inbox(fresh(which))), dtype)
                        plgpu.commit_smem()

                    has_gate = shapes.pre_gates > 0, shapes.post_gates > 0
                    pl.when(((which == 0) & has_gate[0]) | ((which == 1) & has_gate[1]))(multiply)
                else:
                    x = scratch["planes"].at[
                        jnp.where(which == 0, 4 * groups + group, (groups + group) * 2) + fresh(which)
                    ]
                a = sums_of_products(*([(f1, x)] for f1 in complex_planes(scratch["f1"], fresh(which))))
                b = _times(a, complex_planes(scratch["twiddle"], fresh(which)), dtype)
                for part in (0, 1):
                    top, bottom = complex_planes(scratch["f2"].at[:, :, pl.ds(part * TILE, TILE)], fresh(which))
                    (z,) = sums_of_products([(b[0], top), (b[1], bottom)])
                    plane(which, part, fresh(which))[...] = z.astype(dtype)
                plgpu.commit_smem()  # the whole warpgroup has read x

                def refill_inbox():
                    if shapes.post_gates:
                        fetch(step, post_gate, shapes.post_gates, inbox(fresh(which)), 3, fresh(which))
                    elif not gated:
                        fetch_u(step + 1, fresh(which))

                pl.when(which == 0)(refill_inbox)

            @pl.when(with_block(work))
            def _():
                fetch(step, g, shapes.channels, plane(1, 0, fresh()), 1, fresh())
                pl.loop(0, 2)(transform)

            def add_nothing():
                for which in (0, 1):
                    for part in (0, 1):
                        plane(which, part, fresh())[...] = jnp.zeros((N1, TILE), dtype)
                fetch_u(step + 1, fresh())

            if teams > 1:  # a row that is not there
                pl.when(any_work & jnp.logical_not(work))(add_nothing)

            @pl.when(any_work)
            def _():
                meet(fresh())
                channel, feature = schedule.place(item)
                zero = fresh()
                columns = pl.ds(pl.multiple_of((group + zero) * CHUNK, CHUNK), CHUNK)

                def chunk(which, t, j):
                    first = (which * groups + t * team_size + j) * 2 + zero
                    return [load(scratch["planes"].at[first + part, :, columns]) for part in (0, 1)]

                xs = [[chunk(0, t, j) for j in range(count)] for t in range(teams)]
                gs = [[chunk(1, t, j) for j in range(count)] for t in range(teams)]
                begins = lax.rem(step, schedule.rounds) == 0
                for at, some in itertools.product(range(0, CHUNK, _STEP), _fours(lags)):
                    targets = [
                        ds.at[
                            lax.rem(item, schedule.splits),
                            feature,
                            channel,
                            lag - lags[0],
                            part,
                            :,
                            pl.ds((group + zero) * CHUNK + at, _STEP),
                        ]
                        for lag in some
                        for part in (0, 1)
                    ]

                    def sums_so_far(targets=targets):  # all at once: each is a round trip to L2
                        return tuple(plgpu.load(x, layout=plgpu.Layout.WGMMA, optimized=False) for x in targets)

                    def nothing(targets=targets):
                        zeros = jnp.zeros((N1, _STEP), F32)
                        return tuple(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA) for _ in targets)

                    sums = lax.cond(begins, nothing, sums_so_far)
                    sums = _add_block_correlations(sums, xs, gs, slice(at, at + _STEP), some)
                    for target, total in zip(targets, sums, strict=True):
                        target[...] = total
                plgpu.commit_smem()  # the next rows replace what has been read
                meet(fresh())
                if gated:
                    fetch_u(step + 1, fresh())

            @pl.when(jnp.logical_not(any_work))
            def _():
                fetch_u(step + 1, fresh())

    scratch = {
        "f1": matrices((2, N1, N1), dtype, columns=CHUNK),
        "f2": matrices((2, TILE, 2 * TILE), dtype, columns=TILE),
        "twiddle": matrices((2, N1, TILE), dtype, columns=CHUNK),
        "planes": matrices((5 * groups, N1, TILE), dtype, columns=CHUNK),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=6),
            "arrived": plgpu.Barrier(num_arrivals=1, num_barriers=(4 if gated else 2) * groups),
            "all": plgpu.Barrier(num_arrivals=groups, num_barriers=2),
        },
    }
    out = (schedule.splits, shapes.features, shapes.channels, len(lags), 2, N1, TILE)
    return plgpu.kernel(
        fft_conv_blocked_taps_gradient,
        out_type=jax.ShapeDtypeStruct(out, F32),
        scratch_types={"scratch": scratch},
        grid=(schedule.grid,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )


def _fours(lags: range) -> list[range]:
    """The lags, at most four at a time: the sums of more do not fit in registers."""
    return [lags[i : i + 4] for i in range(0, len(lags), 4)]


def _add_block_correlations(sums, xs, gs, columns: slice, lags: range):
    """Adds conj(X_(m-l)) G_m of all rows and blocks to the planes of each lag, in float32."""

    def planes(blocks):
        return [[_float(*(plane[:, columns] for plane in block)) for block in row] for row in blocks]

    xs, gs = planes(xs), planes(gs)
    totals: list[Any] = []
    for lag, re, im in zip(lags, sums[::2], sums[1::2], strict=True):
        for x_row, g_row in zip(xs, gs, strict=True):
            for m in range(max(0, lag), min(len(g_row), len(g_row) + lag)):
                (a, b), (c, d) = x_row[m - lag], g_row[m]
                re, im = re + a * c + b * d, im + a * d - b * c
        totals += [re, im]
    return totals


def _block_products(xs, ks, shapes: Shapes):
    """conj(Y_m) of every block for some columns: pairs of planes, 8 columns at a time in float32."""
    halves = []
    for at in range(0, CHUNK, _STEP):
        columns = slice(at, at + _STEP)
        x = [_float(*(plane[:, columns] for plane in planes)) for planes in xs]
        ys: list[Any] = [None] * shapes.count
        for k, lag in zip(ks, shapes.lag_range, strict=True):
            c, d = _float(*(plane[:, columns] for plane in k))
            for m in range(max(0, lag), min(shapes.count, shapes.count + lag)):
                a, b = x[m - lag]
                re, im = ys[m] or (None, None)  # in this order each line is two fused operations
                ys[m] = (
                    a * c - b * d if re is None else re + a * c - b * d,
                    -(a * d) - b * c if im is None else im - a * d - b * c,
                )
        zero = jnp.zeros_like(x[0][0])
        halves.append([(zero, zero) if y is None else y for y in ys])
    return [
        tuple(lax.concatenate([half[m][plane].astype(shapes.dtype) for half in halves], 1) for plane in (0, 1))
        for m in range(shapes.count)
    ]
