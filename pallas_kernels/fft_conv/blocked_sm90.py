"""Kernels for Hopper and sequences of two to four blocks of 4096 steps: one launch, everything else on chip.

A long convolution is a Toeplitz matrix of blocks. Each block is one too, of 2 * 4096 - 1 lags, and what the
right-angle transform of 4096 points multiplies by is just such a block (`tables`). So with X_j and Y_m the spectra of
blocks of u and of the result

    Y_m = sum_j K_(m-j) X_j

where K_l is the spectrum of the taps from lag 4096 (l - 1) + 1 to 4096 (l + 1) - 1. No zeros are transformed, any
number of blocks will do, and the tables are those of 4096 steps. It costs (J + 1) / 2 complex products for each of J
blocks instead of one, all on chip.

A warpgroup transforms one block (`chain`), and a team of J keeps its spectra in shared memory, where each warpgroup
then does the products of its share of the columns, in place, for all blocks at once: every spectrum is read once. Rows
of the batch never mix.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.chain import ByColumns, apply_gate, floats
from pallas_kernels.fft_conv.config import N1, SHARED_MEMORY_BYTES, TILE
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, PIECE, load, matrices, persistent_kernel, sums_of_products


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
        # Tables take 48 KB since F2 is cut into blocks of 16 points; a lag more in the rest has not been timed.
        tables, matrix = 64 * 1024, 2 * N1 * TILE
        rest = SHARED_MEMORY_BYTES - tables - matrix * (2 * self.teams * self.count + self.team * self.teams)
        return rest // (2 * matrix)

    @property
    def dx_fits(self) -> bool:
        """Whether the backward kernel has room for the spectra of the taps, and so for the cotangent of u."""
        return len(self.lag_range) <= self.team * self.teams

    @property
    def lag_range(self) -> range:
        return range(self.lags[0], self.lags[1] + 1)

    @property
    def spectra(self) -> tuple[int, int, int]:
        """(D, C, lags)."""
        return self.features, self.channels, len(self.lag_range)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """Which item and which row a team works on at each step; an item is a spectrum of taps and a share of the batch.

    A batch is shared out where there are fewer spectra than blocks, and also, in shares of no fewer rows than `least`,
    so that blocks end together: with 768 spectra for 132 blocks the last turn would leave most of them idle, 3 % of the
    time.
    """

    shapes: Shapes
    least: int | None = None

    @property
    def spectra(self):
        return self.shapes.features * self.shapes.channels

    @property
    def splits(self):
        most = max(1, min(self.shapes.blocks // self.spectra, pl.cdiv(self.shapes.batch, self.shapes.teams)))
        if self.least is None:
            return most
        return min(range(1, max(most, self.shapes.batch // self.least) + 1), key=self._steps)

    def _steps(self, splits: int) -> int:
        turns = pl.cdiv(self.spectra * splits, self.shapes.blocks)
        return turns * pl.cdiv(pl.cdiv(self.shapes.batch, splits), self.shapes.teams)

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


def load_tables(f1, f2, twiddle, scratch):
    """Starts their copies."""
    for name, table in (("f1", f1), ("f2", f2), ("twiddle", twiddle)):
        for plane in range(table.shape[0]):
            plgpu.copy_gmem_to_smem(table.at[plane], scratch[name].at[plane], scratch["barriers"]["tables"])


def put(parts, spectrum: Callable[[], Any], dtype):
    """Writes what `column_dft.there` yields, as it comes, to planes in shared memory."""
    for k0, part in enumerate(parts):
        for plane, value in enumerate(part):
            spectrum().at[plane, :, pl.ds(k0 * CHUNK, CHUNK)][...] = value.astype(dtype)


def load_columns(ref):
    """A matrix in shared memory, read 16 columns at a time.

    All that reads or writes so, the tables and spectra too, has a thread's place in a matrix in common. Read whole,
    a matrix takes two more, which the compiler keeps over the whole loop.
    """
    return lax.concatenate([load(ref.at[:, pl.ds(at, CHUNK)]) for at in range(0, TILE, CHUNK)], 1)


def put_columns(ref, value):
    """Writes a matrix to shared memory likewise."""
    for at in range(0, TILE, CHUNK):
        ref.at[:, pl.ds(at, CHUNK)][...] = value[:, at : at + CHUNK]


def inverse(chain: ByColumns, planes, scratch):
    """The real row whose conjugate spectrum is in two planes in shared memory; scratch, (2, 64, 64), carries E."""
    ((*parts,),) = column_dft.back([tuple(map(load_columns, planes))], *chain._operands(back=True))
    for plane, part in enumerate(parts):
        put_columns(scratch.at[plane], part)
    plgpu.commit_smem()
    first = chain.first_block(transposed=True)
    (row,) = sums_of_products([(block, scratch.at[plane]) for plane, block in enumerate(first)])
    return row


def forward(shapes: Shapes):
    """The kernel (u, pre gate, post gate, spectrum, f1, f2, twiddle, [31]) -> y.

    u is `(B, 1 or C, D, length, 64)`, the spectrum of the taps `(D, C, lags, 2, 64, 64)`, y `(B, C, D, length, 64)`. An
    absent gate is not read.
    """
    schedule = _Schedule(shapes, least=8)  # each turn reads the taps' spectra again
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
            load_tables(f1, f2, twiddle, scratch)

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

            chain = ByColumns.over(scratch, fresh)

            @pl.when(first)
            def _():
                if teams > 1:  # a team is past the last item, whose spectrum may go, once it has met: here, both are
                    plgpu.barrier_arrive(barriers["done"])
                    plgpu.barrier_wait(barriers["done"])

                @pl.when(group == 0)
                def _():
                    channel, feature = schedule.place(item)
                    now = fresh()
                    for lag in range(len(lags)):
                        for plane in (0, 1):
                            plgpu.copy_gmem_to_smem(
                                spectrum.at[feature, channel, lag, plane],
                                scratch["taps"].at[lag, plane],
                                barriers["taps"].at[now],
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
                            put_columns(x, apply_gate(x, inbox(zero), dtype))
                            plgpu.commit_smem()

                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left the slot
                    (a,) = chain.first([x])
                    if gated:
                        plgpu.commit_smem()  # the whole warpgroup has read x, which its spectrum replaces
                    put(chain.second([a]), lambda: slot(fresh()), dtype)
                    plgpu.commit_smem()  # the whole warpgroup has read the inbox
                    if not gated:
                        fetch_u(step + 1, fresh())
                    elif shapes.post_gates:
                        fetch(step, post_gate, shapes.post_gates, inbox(fresh()), 1, fresh())

            @pl.when(first)
            def _():
                plgpu.barrier_wait(barriers["taps"].at[fresh()])

            def convolve():
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
                    y = inverse(chain, (mine.at[0], mine.at[1]), slot(fresh()))
                    zero = fresh()
                    mine = slot(zero)
                    if shapes.post_gates:
                        plgpu.barrier_wait(barriers["arrived"].at[groups + group + zero])
                        y = apply_gate(y, inbox(zero), dtype)
                    plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
                    put_columns(mine.at[1], y.astype(dtype))
                    plgpu.commit_smem()

                    item, row, _ = schedule.at(step + zero, team)
                    channel, feature = schedule.place(item)
                    plgpu.copy_smem_to_gmem(mine.at[1], out.at[row, channel, feature, block_rows(zero)])
                    if gated:
                        fetch_u(step + 1, fresh())

            lax.cond(work, convolve, lambda: fetch_u(step + 1, fresh()))

        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "f1": matrices((2, N1, N1), dtype, columns=CHUNK),
        "f2": matrices(column_dft.blocks_shape(TILE), dtype, columns=CHUNK),
        "twiddle": matrices((2, N1, TILE), dtype, columns=CHUNK),
        "taps": matrices((len(lags), 2, N1, TILE), dtype, columns=CHUNK),
        "slots": matrices((teams * count, 2, N1, TILE), dtype, columns=CHUNK),
        "inbox": matrices((groups, N1, TILE), dtype, columns=CHUNK),
        "barriers": dict(
            tables=plgpu.Barrier(num_arrivals=5),
            # The second is not used: only of several can one be named anew, whose address is not kept over the loop
            taps=plgpu.Barrier(num_arrivals=2 * len(lags), num_barriers=2),
            arrived=plgpu.Barrier(num_arrivals=1, num_barriers=2 * groups if gated else groups),
            team=plgpu.Barrier(num_arrivals=team_size, num_barriers=teams),
            **({"done": plgpu.Barrier(num_arrivals=groups)} if teams > 1 else {}),
        ),
    }
    return persistent_kernel(
        fft_conv_blocked_forward,
        jax.ShapeDtypeStruct((shapes.batch, shapes.channels, shapes.features, shapes.length, TILE), dtype),
        scratch,
        schedule.grid,
        groups,
    )


def backward(shapes: Shapes):
    """The kernel (u, g, pre gate, post gate, spectrum, f1, f2, twiddle, [31]) -> (dx, ds).

    With x = pre u, h = post g and their spectra X and H,

        dx_j = Re F^-1(sum over m of conj(K_(m-j)) H_m),    ds_l = sum over rows and m of conj(X_(m-l)) H_m

    u is `(B, 1 or C, D, length, 64)`, g, the cotangent of the result, `(B, C, D, length, 64)`, as is dx, each channel's
    share; ds is `(parts, D, C, lags, 2, 64, 64)` in float32, to be summed over its parts. An absent gate is not read.

    For four lags ds is 128 KB, more than is left on chip. A block of the grid has a row's share of it added to the
    result in L2 by TMA while it works on, 16 columns of a lag at a time. They lie as they are stored, in pieces of 8
    columns, of which a warp fills 256 bytes at once; TMA adds them in rows of 128 bytes, each in one piece.

    The spectra X and H of a row fill shared memory. Those of the taps come from L2 for each row, to the place of X once
    it has been multiplied, if they fit there: `Shapes.dx_fits`. If not, the kernel is for ds alone, without the
    spectrum among its arguments.
    """
    schedule = _Schedule(shapes)
    dtype, count, team_size, teams = shapes.dtype, shapes.count, shapes.team, shapes.teams
    lags = shapes.lag_range
    groups = team_size * teams
    has_gate = shapes.pre_gates > 0, shapes.post_gates > 0

    def body(u, g, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, dx, ds, scratch):
        shift_by = shift[0]
        group = lax.axis_index("warpgroup")
        team, member = (0, group) if teams == 1 else (group // team_size, lax.rem(group, team_size))
        barriers = scratch["barriers"]

        def with_block(work):
            return work if count == team_size else work & (member < count)

        def block_rows(zero):
            """Of the sequences. TMA reads zeros beyond them, and writes nothing there."""
            return pl.ds(pl.multiple_of((member + zero) * N1, N1), N1)

        def plane(which, part, zero):
            """Of the spectrum of this warpgroup's block of x (0) or h (1)."""
            return scratch["planes"].at[(which * groups + group + zero) * 2 + part]

        def arrived(which, part, zero):
            """The barrier of the sequence (0) or the gate (1) that is copied to that plane."""
            return barriers["arrived"].at[(which * 2 + part) * groups + group + zero]

        def fetch(which, step, zero):
            """Starts the copies of this warpgroup's block of u (0) or g (1), and of its gate, at a step."""
            item, row, work = schedule.at(step + zero, team)
            channel, feature = schedule.place(item)
            sources = (
                ((u, shapes.sequences), (pre_gate, shapes.pre_gates)),
                (
                    (g, shapes.channels),
                    (post_gate, shapes.post_gates),
                ),
            )

            @pl.when(with_block(work))
            def _():
                for part, (source, sequences) in enumerate(sources[which][: 1 + has_gate[which]]):
                    plgpu.copy_gmem_to_smem(
                        source.at[row, channel if sequences > 1 else 0, feature, block_rows(zero)],
                        plane(which, part, zero),
                        arrived(which, part, zero),
                    )

        fetch(0, jnp.int32(0), 0)

        @pl.when(group == 0)
        def _():
            load_tables(f1, f2, twiddle, scratch)

        plgpu.barrier_wait(barriers["tables"])

        def meet(which, zero):
            plgpu.barrier_arrive(barriers["all"].at[which + zero])
            plgpu.barrier_wait(barriers["all"].at[which + zero])

        @pl.loop(0, schedule.steps)
        def _(step):
            (item, *_row, work), any_work = schedule.at(step, team), schedule.at(step, 0)[-1]
            zeros = iter(range(1000))

            def fresh(turn=0):
                return lax.shift_right_logical(step + turn + next(zeros), shift_by)

            chain = ByColumns.over(scratch, fresh)

            def transform(which):
                plgpu.barrier_wait(arrived(which, 0, fresh(which)))
                x = plane(which, 0, fresh(which))

                def multiply(x=x):
                    plgpu.barrier_wait(arrived(which, 1, fresh(which)))
                    put_columns(x, apply_gate(x, plane(which, 1, fresh(which)), dtype))
                    plgpu.commit_smem()

                if any(has_gate):
                    pl.when(((which == 0) & has_gate[0]) | ((which == 1) & has_gate[1]))(multiply)
                chain = ByColumns.over(scratch, functools.partial(fresh, which))
                (a,) = chain.first([x])
                plgpu.commit_smem()  # the whole warpgroup has read x, which its spectrum replaces
                first = (which * groups + group) * 2
                put(chain.second([a]), lambda: scratch["planes"].at[pl.ds(first + fresh(which), 2)], dtype)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last dx has left its place

            @pl.when(with_block(work))
            def _():
                fetch(1, step, fresh())
                pl.loop(0, 2)(transform)

            def add_nothing():
                for which in (0, 1):
                    for part in (0, 1):
                        plane(which, part, fresh())[...] = jnp.zeros((N1, TILE), dtype)

            if teams > 1:  # a row that is not there
                pl.when(any_work & jnp.logical_not(work))(add_nothing)

            def own_columns(planes, zero):
                """This warpgroup's 16 columns of two planes."""
                columns = pl.ds(pl.multiple_of((group + zero) * CHUNK, CHUNK), CHUNK)
                return [planes.at[part, :, columns] for part in (0, 1)]

            def spectra(which, zero):
                """Those columns of every block of each team's row."""
                first = [[(which * groups + t * team_size + j) * 2 for j in range(count)] for t in range(teams)]
                return [[own_columns(scratch["planes"].at[pl.ds(i + zero, 2)], zero) for i in row] for row in first]

            def values(rows):
                return [[[load(part) for part in planes] for planes in row] for row in rows]

            def products():
                plgpu.commit_smem()
                meet(0, fresh())
                channel, feature = schedule.place(item)
                xs, hs = values(spectra(0, fresh())), values(spectra(1, fresh()))
                plgpu.commit_smem()  # something else takes the place of what has been read
                meet(1, fresh())
                if not shapes.dx_fits:
                    fetch(0, step + 1, fresh())
                else:

                    @pl.when(group == 0)
                    def _():
                        now = fresh()
                        for lag, part in itertools.product(range(len(lags)), (0, 1)):
                            plgpu.copy_gmem_to_smem(
                                spectrum.at[feature, channel, lag, part],
                                scratch["planes"].at[lag * 2 + part + fresh()],
                                barriers["taps"].at[now],
                            )

                begins = lax.rem(step, schedule.rounds) == 0
                place = lax.rem(item, schedule.splits) * schedule.spectra + feature * shapes.channels + channel
                plgpu.wait_smem_to_gmem(0)  # in order, or else the sums would depend on chance

                def add(lag):
                    sums = _block_correlations(xs, hs, lag)
                    zero = fresh()
                    share = scratch["sums"].at[group + zero]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for number, piece in enumerate(sums):
                        share.at[number][...] = piece
                    plgpu.commit_smem()
                    share = share.reshape(N1, 2 * CHUNK)
                    target = ds.at[place * len(lags) + lag - lags[0], group + zero]
                    pl.when(begins)(functools.partial(plgpu.copy_smem_to_gmem, share, target))
                    add = functools.partial(plgpu.copy_smem_to_gmem, share, target, reduction_op="add")
                    pl.when(jnp.logical_not(begins))(add)

                for lag in lags:
                    if shapes.dx_fits:
                        add(lag)
                    else:  # a branch that is always taken: without it the compiler keeps X and H, which this lag needs
                        # in float32, for the next lag, and spills 144 to 260 bytes
                        pl.when(fresh() == 0)(functools.partial(add, lag))

                if shapes.dx_fits:
                    plgpu.barrier_wait(barriers["taps"].at[fresh()])
                    zero = fresh()
                    for row in spectra(1, zero):
                        ks = [
                            own_columns(scratch["planes"].at[pl.ds(lag * 2 + zero, 2)], zero)
                            for lag in range(len(lags))
                        ]
                        (hs_of_row,), (ks,) = values([row]), values([ks])
                        products = _block_products(hs_of_row, ks, shapes, adjoint=True)
                        for planes, product in zip(row, products, strict=True):
                            for part in (0, 1):
                                planes[part][...] = product[part]
                    plgpu.commit_smem()
                    meet(0, fresh())
                    fetch(0, step + 1, fresh())

            def transform_back():
                product = [plane(1, part, fresh()) for part in (0, 1)]
                mine = scratch["planes"].at[pl.ds((groups + group) * 2 + fresh(), 2)]
                result = inverse(chain, product, mine)
                plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
                zero = fresh()
                put_columns(plane(1, 1, zero), result.astype(dtype))
                plgpu.commit_smem()
                this, row, _ = schedule.at(step + zero, team)
                channel, feature = schedule.place(this)
                plgpu.copy_smem_to_gmem(plane(1, 1, zero), dx.at[row, channel, feature, block_rows(zero)])

            lax.cond(any_work, products, lambda: fetch(0, step + 1, fresh()))
            if shapes.dx_fits:
                pl.when(with_block(work))(transform_back)

        plgpu.wait_smem_to_gmem(0)

    def fft_conv_blocked_backward(u, g, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, dx, ds, scratch):
        body(u, g, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, dx, ds, scratch)

    def fft_conv_blocked_taps_gradient(u, g, pre_gate, post_gate, f1, f2, twiddle, shift, ds, scratch):
        body(u, g, pre_gate, post_gate, None, f1, f2, twiddle, shift, None, ds, scratch)

    scratch = {
        "f1": matrices((2, N1, N1), dtype, columns=CHUNK),
        "f2": matrices(column_dft.blocks_shape(TILE), dtype, columns=CHUNK),
        "twiddle": matrices((2, N1, TILE), dtype, columns=CHUNK),
        "planes": matrices((4 * groups, N1, TILE), dtype, columns=CHUNK),
        "sums": plgpu.SMEM((groups, 2 * CHUNK // PIECE, N1, PIECE), F32),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=5),
            "taps": plgpu.Barrier(num_arrivals=2 * len(lags), num_barriers=2),  # the second unused, as in `forward`
            "arrived": plgpu.Barrier(num_arrivals=1, num_barriers=(4 if any(has_gate) else 3) * groups),
            "all": plgpu.Barrier(num_arrivals=groups, num_barriers=2),
        },
    }
    dx = jax.ShapeDtypeStruct((shapes.batch, shapes.channels, shapes.features, shapes.length, TILE), dtype)
    ds = jax.ShapeDtypeStruct((schedule.splits * schedule.spectra * len(lags), groups, N1, 2 * CHUNK), F32)
    return persistent_kernel(
        fft_conv_blocked_backward if shapes.dx_fits else fft_conv_blocked_taps_gradient,
        (dx, ds) if shapes.dx_fits else (ds,),
        scratch,
        schedule.grid,
        groups,
    )


def whole_spectra(ds, shapes: Shapes):
    """What `backward` gives for the spectra, put together: each warpgroup's columns are by themselves there."""
    ds = ds.reshape(-1, *shapes.spectra, shapes.team * shapes.teams, 2, CHUNK // PIECE, N1, PIECE)
    return jnp.moveaxis(ds, (-5, -4, -3), (-3, -5, -2)).reshape(-1, *shapes.spectra, 2, N1, TILE)


def _block_correlations(xs, gs, lag: int):
    """Of conj(X_(m-lag)) G_m, summed over all rows and blocks in float32, re and then im in pieces of 8 columns."""
    parts: tuple[list, list] = ([], [])
    for at in range(0, CHUNK, PIECE):
        columns = slice(at, at + PIECE)
        re = im = None
        for x_row, g_row in zip(xs, gs, strict=True):
            for m in range(max(0, lag), min(len(g_row), len(g_row) + lag)):
                (a, b), (c, d) = (floats(*(plane[:, columns] for plane in z)) for z in (x_row[m - lag], g_row[m]))
                re = a * c + b * d if re is None else re + a * c + b * d
                im = a * d - b * c if im is None else im + a * d - b * c
        for part, total in zip(parts, (re, im), strict=True):
            part.append(total)
    return [*parts[0], *parts[1]]


def _block_products(xs, ks, shapes: Shapes, adjoint: bool = False):
    """Pairs of planes of conj(Y_m) of every block for some columns, 8 columns at a time in float32.

    The adjoint is that of Y_j = sum_m conj(K_(m-j)) X_m.
    """
    halves = []
    for at in range(0, CHUNK, PIECE):
        columns = slice(at, at + PIECE)
        x = [floats(*(plane[:, columns] for plane in planes)) for planes in xs]
        ys: list[Any] = [None] * shapes.count
        for k, lag in zip(ks, shapes.lag_range, strict=True):
            c, d = floats(*(plane[:, columns] for plane in k))
            for m in range(max(0, lag), min(shapes.count, shapes.count + lag)):
                source, target = (m, m - lag) if adjoint else (m - lag, m)
                a, b = x[source]
                re, im = ys[target] or (None, None)  # in this order each line is two fused operations
                if adjoint:
                    ys[target] = (
                        a * c + b * d if re is None else re + a * c + b * d,
                        a * d - b * c if im is None else im + a * d - b * c,
                    )
                else:
                    ys[target] = (
                        a * c - b * d if re is None else re + a * c - b * d,
                        -(a * d) - b * c if im is None else im - a * d - b * c,
                    )
        zero = jnp.zeros_like(x[0][0])
        halves.append([(zero, zero) if y is None else y for y in ys])
    return [
        tuple(lax.concatenate([half[m][plane].astype(shapes.dtype) for half in halves], 1) for plane in (0, 1))
        for m in range(shapes.count)
    ]
