"""The kernel for Hopper and causal sequences of five to eight blocks of 4096 steps: spectra of the taps come from L2.

It is the scheme of `block_toeplitz`, Y_m = sum_j K_(m-j) X_j, for more spectra than leave room for those of the taps.
Each of four warpgroups transforms two blocks, one after the other, and does the products of 16 columns for all of them.
The taps' spectra pass it by in pieces of those columns, 4 KB each, three at a time, where a gate passes otherwise.
Blocks 4 to 7 of the result come first, which need all of X, and then the others, which need only themselves: every
piece is read once for four results, and those of lags below 4 twice. What surrounds a product, waiting, fetching and
addresses, is some 85 instructions of a warp, as much as the products of two results: so pieces are as wide as can be.
"""

import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.block_toeplitz import Schedule, Shapes, load_tables, put
from pallas_kernels.fft_conv.chain import ByColumns, apply_gate, floats
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.mosaic import CHUNK, load, matrices, persistent_kernel

GROUPS = 4
MAX_BLOCKS = 2 * GROUPS
"""As many spectra, 128 KB, fit beside the tables."""

_RING = 3
"""Pieces of the taps' spectra on their way or in work, for each warpgroup."""


def forward(shapes: Shapes):
    """The kernel (u, pre gate, post gate, spectra of the taps, f1, f2, twiddle, [31]) -> y.

    u is `(B, 1 or C, D, length, 64)`, the spectra `(D, C, lags, 2, 64, 64)`, y `(B, C, D, length, 64)`. An absent gate
    is not read. Lags are those of a causal convolution.
    """
    assert shapes.lags == (0, shapes.count - 1)
    assert GROUPS < shapes.count <= MAX_BLOCKS
    schedule = Schedule(shapes, least=1)  # whose spectra are read for each row in any case
    dtype, count = shapes.dtype, shapes.count
    results = range(GROUPS, count), range(GROUPS)
    # The lag of each piece in the order in which they pass
    order = [lag for ms in results for lag in range(ms[-1] + 1)]

    def fft_conv_streamed_forward(u, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, out, scratch):
        shift_by = shift[0]
        group = lax.axis_index("warpgroup")
        barriers = scratch["barriers"]
        ring = scratch["ring"]

        def slot(second, zero):
            """The place of this warpgroup's first or second block."""
            return scratch["slots"].at[second * GROUPS + group + zero]

        def exists(second):
            return second * GROUPS + group < count

        def block_rows(second, zero):
            """Of u and y. TMA reads zeros beyond the sequence, and writes nothing there."""
            return pl.ds(pl.multiple_of((second * GROUPS + group + zero) * N1, N1), N1)

        def fetch_u(step, second, zero):
            """Starts the copy of one of this warpgroup's blocks to the place of its spectrum."""
            item, row, work = schedule.at(step + zero, 0)
            channel, feature = schedule.place(item)

            @pl.when(work & exists(second))
            def _():
                source = u.at[row, channel if shapes.sequences > 1 else 0, feature, block_rows(second, zero)]
                barrier = barriers["u"].at[second * GROUPS + group + zero]
                plgpu.copy_gmem_to_smem(source, slot(second, zero).at[0], barrier)

        def fetch_gate(step, second, gate, sequences, zero):
            """Starts the copy of that block of a gate, 16 columns to each place of the ring; `sequences` is 1 or C."""
            if not sequences:
                return
            item, row, work = schedule.at(step + zero, 0)
            channel, feature = schedule.place(item)

            @pl.when(work & exists(second))
            def _():
                source = gate.at[row, channel if sequences > 1 else 0, feature, block_rows(second, zero)]
                for number, target in enumerate(gate_pieces(zero)):
                    columns = pl.ds(number * CHUNK, CHUNK)
                    plgpu.copy_gmem_to_smem(source.at[:, columns], target, barriers["gate"].at[group + zero])

        def gate_pieces(zero):
            """Its places in the ring, of 16 columns."""
            return [ring.at[group * _RING + number // 2 + zero, number % 2] for number in range(TILE // CHUNK)]

        def gate_in_ring(zero):
            """Waits for it."""
            plgpu.barrier_wait(barriers["gate"].at[group + zero])
            return lax.concatenate([load(piece) for piece in gate_pieces(zero)], 1)

        def columns_of_group(zero):
            return pl.ds(pl.multiple_of((group + zero) * CHUNK, CHUNK), CHUNK)

        def fetch_piece(step, number, zero):
            item, *_ = schedule.at(step + zero, 0)
            channel, feature = schedule.place(item)
            place = group * _RING + number % _RING + zero
            for plane in (0, 1):
                source = spectrum.at[feature, channel, order[number], plane, :, columns_of_group(zero)]
                plgpu.copy_gmem_to_smem(source, ring.at[place, plane], barriers["ring"].at[place])

        fetch_gate(jnp.int32(0), 0, pre_gate, shapes.pre_gates, 0)
        for second in (0, 1):
            fetch_u(jnp.int32(0), second, 0)

        @pl.when(group == 0)
        def _():
            load_tables(f1, f2, twiddle, scratch)

        plgpu.barrier_wait(barriers["tables"])

        def meet(zero):
            plgpu.barrier_arrive(barriers["all"].at[zero])
            plgpu.barrier_wait(barriers["all"].at[zero])

        @pl.loop(0, schedule.steps)
        def _(step):
            *_, work = schedule.at(step, 0)
            zeros = iter(range(1000))

            def fresh(turn=0):
                return lax.shift_right_logical(step + turn + next(zeros), shift_by)

            def transform(second):
                @pl.when(exists(second))
                def _():
                    zero = fresh(second)
                    plgpu.barrier_wait(barriers["u"].at[second * GROUPS + group + zero])
                    x = slot(second, zero).at[0]
                    if shapes.pre_gates:
                        x[...] = apply_gate(load(x), gate_in_ring(fresh(second)), dtype)
                        plgpu.commit_smem()
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left the slots
                    chain = ByColumns.over(scratch, functools.partial(fresh, second))
                    (a,) = chain.first([x])
                    plgpu.commit_smem()  # the whole warpgroup has read x, which its spectrum replaces

                    next_gate = functools.partial(fetch_gate, step, 1, pre_gate, shapes.pre_gates, fresh(second))
                    pl.when(second == 0)(next_gate)
                    put(chain.second([a]), lambda: slot(second, fresh(second)), dtype)

            def products():
                """Each warpgroup its own columns of all blocks, in place."""
                numbers = itertools.count()
                for ms in results:
                    # Branches, though they are always taken: the compiler would mix the products of different results
                    # and spill what it keeps for them.
                    pl.when(fresh() == 0)(functools.partial(products_of, ms, numbers))

            def products_of(ms, numbers):
                ys: dict[int, tuple] = {}
                for lag in range(ms[-1] + 1):
                    number, zero = next(numbers), fresh()
                    if number + _RING - 1 < len(order):
                        plgpu.commit_smem()  # the whole warpgroup has read the piece before
                        fetch_piece(step, number + _RING - 1, zero)
                    place = group * _RING + number % _RING + zero
                    plgpu.barrier_wait(barriers["ring"].at[place])
                    c, d = floats(*(load(ring.at[place, plane]) for plane in (0, 1)))
                    for m in ms:
                        if m < lag:
                            continue
                        spectrum_of_block = scratch["slots"].at[m - lag + zero, :, :, columns_of_group(zero)]
                        a, b = floats(*(load(spectrum_of_block.at[plane]) for plane in (0, 1)))
                        if m not in ys:  # conj(Y), in an order in which each line is two fused operations
                            ys[m] = a * c - b * d, -(a * d) - b * c
                        else:
                            re, im = ys[m]
                            ys[m] = re + a * c - b * d, im - a * d - b * c
                for m, y in ys.items():
                    zero = fresh()
                    for plane, part in enumerate(y):
                        scratch["slots"].at[m + zero, plane, :, columns_of_group(zero)][...] = part.astype(dtype)

            def transform_back(second):
                @pl.when(exists(second))
                def _():
                    mine = slot(second, fresh(second))
                    planes = load(mine.at[0]), load(mine.at[1])
                    chain = ByColumns.over(scratch, functools.partial(fresh, second))
                    (y,) = chain.inverse([planes], [slot(second, fresh(second))])
                    zero = fresh(second)
                    mine = slot(second, zero)
                    if shapes.post_gates:
                        y = apply_gate(y, gate_in_ring(fresh(second)), dtype)
                    plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
                    mine[1] = y.astype(dtype)
                    plgpu.commit_smem()

                    item, row, _ = schedule.at(step + zero, 0)
                    channel, feature = schedule.place(item)
                    plgpu.copy_smem_to_gmem(mine.at[1], out.at[row, channel, feature, block_rows(second, zero)])
                    fetch_u(step + 1, second, fresh(second))

                    next_gate = functools.partial(fetch_gate, step, 1, post_gate, shapes.post_gates, fresh(second))
                    pl.when(second == 0)(next_gate)

            def convolve():
                pl.loop(0, 2)(transform)
                plgpu.commit_smem()
                for number in range(_RING - 1):
                    fetch_piece(step, number, fresh())
                meet(fresh())
                products()
                plgpu.commit_smem()
                fetch_gate(step, 0, post_gate, shapes.post_gates, fresh())
                if not shapes.post_gates:
                    fetch_gate(step + 1, 0, pre_gate, shapes.pre_gates, fresh())
                meet(fresh())
                pl.loop(0, 2)(transform_back)
                if shapes.post_gates:
                    plgpu.commit_smem()
                    fetch_gate(step + 1, 0, pre_gate, shapes.pre_gates, fresh())

            def fetch_next():
                fetch_gate(step + 1, 0, pre_gate, shapes.pre_gates, fresh())
                for second in (0, 1):
                    fetch_u(step + 1, second, fresh())

            pl.when(work)(convolve)
            pl.when(jnp.logical_not(work))(fetch_next)

        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "f1": matrices((2, N1, N1), dtype, columns=CHUNK),
        "f2": matrices(column_dft.blocks_shape(TILE), dtype, columns=CHUNK),
        "twiddle": matrices((2, N1, TILE), dtype, columns=CHUNK),
        "slots": matrices((MAX_BLOCKS, 2, N1, TILE), dtype, columns=CHUNK),
        "ring": matrices((GROUPS * _RING, 2, N1, CHUNK), dtype),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=5),
            "ring": plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS * _RING),
            "gate": plgpu.Barrier(num_arrivals=TILE // CHUNK, num_barriers=GROUPS),
            "all": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=1),
            "u": plgpu.Barrier(num_arrivals=1, num_barriers=MAX_BLOCKS),
        },
    }
    return persistent_kernel(
        fft_conv_streamed_forward,
        jax.ShapeDtypeStruct((shapes.batch, shapes.channels, shapes.features, shapes.length, TILE), dtype),
        scratch,
        schedule.grid,
        GROUPS,
    )
