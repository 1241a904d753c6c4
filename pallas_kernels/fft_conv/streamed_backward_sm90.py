"""The backward kernels for Hopper and causal sequences of five to eight blocks of 4096 steps.

With the spectra X of u and H of g, the cotangent of the result (`block_toeplitz`),

    du_j = Re F^-1(sum over s of conj(K_s) H_(j+s)),      dK_l = sum over rows and s of conj(X_s) H_(l+s)

Both are the same sums of H with something else. So H is what stays on chip, as u's spectra do in `streamed_sm90`, and
spectra of the taps and of u pass it by alike, from memory to registers. X does not fit beside H: `transform` writes it
to memory first, in the order of threads, of twice the size of u. That is 2 + 4 bytes a step and then 2 + 4 + 2, where
three passes would move 6 + 6 + 12 + 6.

For eight lags dK is 256 KB, more than is left on chip. As in `blocked_backward_sm90` a row's share of it is added to the
result in L2 by TMA, 8 columns of a lag at a time, in the order of threads.
"""

import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.block_toeplitz import Schedule, Shapes, inverse, load_tables, put, put_columns
from pallas_kernels.fft_conv.chain import floats
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, PIECE, load, matrices, persistent_kernel
from pallas_kernels.fft_conv.rearranged import fragment, fragment_shape, from_fragments, load_fragment, parts
from pallas_kernels.fft_conv.streamed_sm90 import GROUPS, MAX_BLOCKS, _Chain

_PIECES = TILE // PIECE
_AHEAD = 3
"""Pieces of spectra on their way while one is in work: those of u come from memory, not L2."""
_LINES = 32, 32
"""What 8 columns of dK are copied as: rows of 128 bytes."""


def spectra_of_sequences(shapes: Shapes) -> jax.ShapeDtypeStruct:
    """What `transform` makes, `(B, 1 or C, D, blocks, 8, *fragment_shape)`."""
    shape = shapes.batch, shapes.sequences, shapes.features, shapes.count, _PIECES, *fragment_shape(shapes.dtype)
    return jax.ShapeDtypeStruct(shape, shapes.dtype)


def transform(shapes: Shapes):
    """The kernel (u, f1, f2, twiddle, [31]) -> spectra of its blocks, `spectra_of_sequences`.

    u is `(B, 1 or C, D, length, 64)`. Each warpgroup has a block to itself, and the next one on its way.
    """
    out_type = spectra_of_sequences(shapes)
    dtype, count = shapes.dtype, shapes.count
    sequences = shapes.batch * shapes.sequences * shapes.features
    grid = min(shapes.blocks, pl.cdiv(sequences * count, GROUPS))
    steps = pl.cdiv(sequences * count, grid * GROUPS)

    def fft_conv_streamed_transform(u, f1, f2, twiddle, shift, out, scratch):
        shift_by = shift[0]
        group = lax.axis_index("warpgroup")
        barriers = scratch["barriers"]

        def place(step):
            """(row, sequence, feature, block) of this warpgroup, and whether there is one."""
            number = (step * grid + lax.axis_index("block")) * GROUPS + group
            sequence, block = number // count, lax.rem(number, count)
            outer, feature = sequence // shapes.features, lax.rem(sequence, shapes.features)
            where = outer // shapes.sequences, lax.rem(outer, shapes.sequences), feature, block
            return where, (step < steps) & (number < sequences * count)

        def fetch(step):
            (row, channel, feature, block), work = place(step)
            number = 2 * group + lax.rem(step, 2)

            @pl.when(work)
            def _():
                rows = pl.ds(pl.multiple_of(block * N1, N1), N1)  # TMA reads zeros beyond the sequence
                source = u.at[row, channel, feature, rows]
                plgpu.copy_gmem_to_smem(source, scratch["inbox"].at[number], barriers["u"].at[number])

        fetch(jnp.int32(0))

        @pl.when(group == 0)
        def _():
            load_tables(f1, f2, twiddle, scratch)

        plgpu.barrier_wait(barriers["tables"])

        @pl.loop(0, steps)
        def _(step):
            (row, channel, feature, block), work = place(step)
            zeros = iter(range(1000))

            def fresh():
                return lax.shift_right_logical(step + next(zeros), shift_by)

            @pl.when(work)
            def _():
                fetch(step + 1)
                number = 2 * group + lax.rem(step, 2)
                plgpu.barrier_wait(barriers["u"].at[number])
                chain = _Chain.over(scratch, fresh)
                (a,) = chain.first([scratch["inbox"].at[number]])
                target = out.at[row, channel, feature, block]
                for k0, z in enumerate(chain.second([a])):
                    for half in range(CHUNK // PIECE):
                        columns = slice(half * PIECE, (half + 1) * PIECE)
                        re, im = (part[:, columns].astype(dtype) for part in z)
                        target.at[k0 * CHUNK // PIECE + half][...] = fragment(re, im)

    scratch = {
        "f1": matrices((2, N1, N1), dtype, columns=TILE),
        "f2": matrices(column_dft.blocks_shape(TILE), dtype, columns=CHUNK),
        "twiddle": plgpu.SMEM((_PIECES, *fragment_shape(F32)), F32),
        "inbox": matrices((2 * GROUPS, N1, TILE), dtype),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=3 + _PIECES),
            "u": plgpu.Barrier(num_arrivals=1, num_barriers=2 * GROUPS),
        },
    }
    return persistent_kernel(fft_conv_streamed_transform, out_type, scratch, grid, GROUPS)


def backward(shapes: Shapes):
    """The kernel (g, spectra of u, spectra of the taps, f1, f2, twiddle, [31]) -> (du, dk).

    g and du, each channel's share, are `(B, C, D, length, 64)`; the spectra of u are `spectra_of_sequences`, those of
    the taps `(D, C, lags, 8, *fragment_shape)`; dk is `(parts D C lags, 8, 32, 32)` in float32, `whole_spectra`.
    """
    assert shapes.lags == (0, shapes.count - 1)
    assert GROUPS < shapes.count <= MAX_BLOCKS
    assert not shapes.pre_gates + shapes.post_gates
    schedule = Schedule(shapes)
    dtype, count = shapes.dtype, shapes.count
    results = range(GROUPS), range(GROUPS, count)

    def fft_conv_streamed_backward(g, xs, ks, f1, f2, twiddle, shift, du, dk, scratch):
        shift_by = shift[0]
        group = lax.axis_index("warpgroup")
        barriers = scratch["barriers"]

        def slot(second, zero):
            """The place of this warpgroup's first or second block."""
            return scratch["slots"].at[second * GROUPS + group + zero]

        def exists(second):
            return second * GROUPS + group < count

        def block_rows(second, zero):
            """Of g and du. TMA reads zeros beyond the sequence, and writes nothing there."""
            return pl.ds(pl.multiple_of((second * GROUPS + group + zero) * N1, N1), N1)

        def fetch(step, second, zero):
            """Starts the copy of one of this warpgroup's blocks to the place of its spectrum."""
            item, row, work = schedule.at(step + zero, 0)
            channel, feature = schedule.place(item)

            @pl.when(work & exists(second))
            def _():
                source = g.at[row, channel, feature, block_rows(second, zero)]
                barrier = barriers["g"].at[second * GROUPS + group + zero]
                plgpu.copy_gmem_to_smem(source, slot(second, zero).at[0], barrier)

        def columns_of_group(zero):
            return pl.ds(pl.multiple_of((group + zero) * CHUNK, CHUNK), CHUNK)

        for second in (0, 1):
            fetch(jnp.int32(0), second, 0)

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

            def always(function, *arguments):
                """A branch, though it is always taken: the compiler would mix the sums of different results."""
                pl.when(fresh() == 0)(functools.partial(function, *arguments))

            def transform(second):
                @pl.when(exists(second))
                def _():
                    zero = fresh(second)
                    plgpu.barrier_wait(barriers["g"].at[second * GROUPS + group + zero])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left the slots
                    chain = _Chain.over(scratch, functools.partial(fresh, second))
                    (a,) = chain.first([slot(second, zero).at[0]])
                    plgpu.commit_smem()  # the whole warpgroup has read g, which its spectrum replaces
                    put(chain.second([a]), lambda: slot(second, fresh(second)), dtype)

            def sums(spectra, ms, half, conjugate: bool):
                """For each m of 8 columns both parts of the sum over s of conj(S_s) H_(m+s), or of its conjugate."""
                zero, columns = fresh(), slice(half * PIECE, (half + 1) * PIECE)
                piece = group * (CHUNK // PIECE) + half
                others = range(count - ms[0])
                ahead = [load_fragment(spectra(s, zero).at[piece]) for s in others[:_AHEAD]]
                hs: dict[int, tuple] = {}
                totals: dict[int, tuple] = {}
                for s in others:
                    if s + _AHEAD in others:
                        ahead.append(load_fragment(spectra(s + _AHEAD, zero).at[piece]))
                    c, d = floats(*parts(ahead[s]))
                    for m in ms:
                        if m + s >= count:
                            continue
                        if m + s not in hs:
                            block = scratch["slots"].at[m + s + zero, :, :, columns_of_group(zero)]
                            hs[m + s] = floats(*(load(block.at[plane])[:, columns] for plane in (0, 1)))
                        a, b = hs[m + s]
                        re, im = totals.get(m) or (None, None)  # in this order each line is two fused operations
                        if conjugate:
                            turned = a * d - b * c if im is None else im + a * d - b * c
                        else:
                            turned = b * c - a * d if im is None else im + b * c - a * d
                        totals[m] = (a * c + b * d if re is None else re + a * c + b * d), turned
                return [totals[m] for m in ms]

            copies = itertools.count()

            def add(ms, half):
                """This row's share of dK."""
                item, row, _ = schedule.at(step + fresh(), 0)
                channel, feature = schedule.place(item)
                begins = lax.rem(step, schedule.rounds) == 0
                place = lax.rem(item, schedule.splits) * schedule.spectra + feature * shapes.channels + channel

                def spectra(s, zero):
                    return xs.at[row, channel if shapes.sequences > 1 else 0, feature, s + zero]

                for m, total in zip(ms, sums(spectra, ms, half, conjugate=False), strict=True):
                    share = scratch["sums"].at[2 * group + next(copies) % 2 + fresh()]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the last but one has left this place
                    share[...] = fragment(*total)
                    plgpu.commit_smem()
                    source = share.reshape(*_LINES)
                    target = dk.at[place * count + m, group * (CHUNK // PIECE) + half]
                    pl.when(begins)(functools.partial(plgpu.copy_smem_to_gmem, source, target))
                    copy = functools.partial(plgpu.copy_smem_to_gmem, source, target, reduction_op="add")
                    pl.when(jnp.logical_not(begins))(copy)

            def multiply(ms):
                """In place of H the conjugate spectra of du, of this warpgroup's columns."""
                item, *_ = schedule.at(step + fresh(), 0)
                channel, feature = schedule.place(item)

                def spectra(s, zero):
                    return ks.at[feature, channel, s + zero]

                halves = [
                    [[part.astype(dtype) for part in total] for total in sums(spectra, ms, half, conjugate=True)]
                    for half in range(CHUNK // PIECE)
                ]
                for m, pieces in zip(ms, zip(*halves, strict=True), strict=True):
                    zero = fresh()
                    for plane, both in enumerate(zip(*pieces, strict=True)):
                        value = lax.concatenate(list(both), 1)
                        scratch["slots"].at[m + zero, plane, :, columns_of_group(zero)][...] = value

            def transform_back(second):
                @pl.when(exists(second))
                def _():
                    mine = slot(second, fresh(second))
                    chain = _Chain.over(scratch, functools.partial(fresh, second))
                    result = inverse(chain, [mine.at[plane] for plane in (0, 1)], slot(second, fresh(second)))
                    plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
                    zero = fresh(second)
                    mine = slot(second, zero)
                    put_columns(mine.at[1], result.astype(dtype))
                    plgpu.commit_smem()
                    item, row, _ = schedule.at(step + zero, 0)
                    channel, feature = schedule.place(item)
                    plgpu.copy_smem_to_gmem(mine.at[1], du.at[row, channel, feature, block_rows(second, zero)])
                    fetch(step + 1, second, fresh(second))

            def convolve():
                pl.loop(0, 2)(transform)
                plgpu.commit_smem()
                meet(fresh())
                plgpu.wait_smem_to_gmem(0)  # the last row's share has been added: sums should not depend on chance
                for ms in results:
                    for half in range(CHUNK // PIECE):
                        always(add, ms, half)
                for ms in results:
                    always(multiply, ms)
                plgpu.commit_smem()
                meet(fresh())
                pl.loop(0, 2)(transform_back)

            def fetch_next():
                for second in (0, 1):
                    fetch(step + 1, second, fresh())

            pl.when(work)(convolve)
            pl.when(jnp.logical_not(work))(fetch_next)

        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "f1": matrices((2, N1, N1), dtype, columns=CHUNK),
        "f2": matrices(column_dft.blocks_shape(TILE), dtype, columns=CHUNK),
        "twiddle": plgpu.SMEM((_PIECES, *fragment_shape(F32)), F32),
        "slots": matrices((MAX_BLOCKS, 2, N1, TILE), dtype, columns=CHUNK),
        "sums": plgpu.SMEM((2 * GROUPS, *fragment_shape(F32)), F32),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=3 + _PIECES),
            "all": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=1),
            "g": plgpu.Barrier(num_arrivals=1, num_barriers=MAX_BLOCKS),
        },
    }
    du = jax.ShapeDtypeStruct((shapes.batch, shapes.channels, shapes.features, shapes.length, TILE), dtype)
    dk = jax.ShapeDtypeStruct((schedule.splits * schedule.spectra * count, _PIECES, *_LINES), F32)
    return persistent_kernel(fft_conv_streamed_backward, (du, dk), scratch, schedule.grid, GROUPS)


def whole_spectra(dk, shapes: Shapes):
    """What `backward` gives for the spectra of the taps, put together: `(parts, D, C, lags, 2, 64, 64)`."""
    of_threads = dk.reshape(-1, *shapes.spectra, _PIECES, *fragment_shape(F32))
    return jnp.stack(from_fragments(of_threads), -3)
