"""The forward kernel for Hopper and sequences of two to four blocks of 4096 steps: one launch, all else on chip.

`block_toeplitz` has the algebra. A warpgroup transforms one block (`chain`), and a team of J keeps its spectra in
shared memory, where each warpgroup then does the products of its share of the columns, in place, for all blocks at
once: every spectrum is read once. Rows of the batch never mix.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.block_toeplitz import (
    Schedule,
    Shapes,
    block_products,
    inverse,
    load_tables,
    put,
    put_columns,
)
from pallas_kernels.fft_conv.chain import ByColumns, apply_gate
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.mosaic import CHUNK, load, matrices, persistent_kernel


def forward(shapes: Shapes):
    """The kernel (u, pre gate, post gate, spectrum, f1, f2, twiddle, [31]) -> y.

    u is `(B, 1 or C, D, length, 64)`, the spectrum of the taps `(D, C, lags, 2, 64, 64)`, y `(B, C, D, length, 64)`. An
    absent gate is not read.
    """
    schedule = Schedule(shapes, least=8)  # each turn reads the taps' spectra again
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
                    ys = block_products(xs, ks, shapes)
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
