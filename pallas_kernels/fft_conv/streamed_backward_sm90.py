"""The backward kernels for Hopper and causal sequences of five to eight blocks of 4096 steps, three launches.

With the spectra X of u and H of g, the cotangent of the result (`block_toeplitz`),

    du_j = Re F^-1(sum over s of conj(K_s) H_(j+s)),      dK_l = sum over rows and s of conj(X_s) H_(l+s)

`transform` makes X, and `backward` du, as `streamed_sm90` makes the result: H stays on chip, and the spectra of the
taps pass it by from L2 to registers. It leaves H in memory, beside X, both in the order of threads, of twice the size of
u each. So `taps_gradient` needs neither transforms nor shared memory: a warpgroup has 8 columns of a feature and keeps
its sums in registers over the rows of the batch. All of it moves 2 + 4, 2 + 4 + 2 and 4 + 4 bytes a step, where three
passes move 6 + 6 + 12 + 6.

As sums that a row adds to memory, 256 KB of them, dK took 8.0 ms of 49,152 rows of 32,768 steps on an H200, beside 6.2 for
du: those of 132 features are 34 MB, which L2 does not keep beside what comes and goes.
"""

import functools

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
from pallas_kernels.fft_conv.rearranged import fragment, fragment_shape, load_fragment, parts
from pallas_kernels.fft_conv.streamed_sm90 import GROUPS, MAX_BLOCKS, _Chain

_PIECES = TILE // PIECE
_AHEAD = 2
"""Fragments of the taps' spectra that are on their way while one is in work."""


def spectra_of(sequences: int, shapes: Shapes) -> jax.ShapeDtypeStruct:
    """X or H, `(B, 1 or C, D, 8, blocks, *fragment_shape)`: what a warpgroup sums up lies together."""
    shape = shapes.batch, sequences, shapes.features, _PIECES, shapes.count, *fragment_shape(shapes.dtype)
    return jax.ShapeDtypeStruct(shape, shapes.dtype)


def transform(shapes: Shapes):
    """The kernel (u, f1, f2, twiddle, [31]) -> X, `spectra_of` as many sequences as u has.

    u is `(B, 1 or C, D, length, 64)`. Each warpgroup has a block to itself, and the next one on its way.
    """
    out_type = spectra_of(shapes.sequences, shapes)
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
                target = out.at[row, channel, feature]
                for k0, z in enumerate(chain.second([a])):
                    for half in range(CHUNK // PIECE):
                        columns = slice(half * PIECE, (half + 1) * PIECE)
                        re, im = (part[:, columns].astype(dtype) for part in z)
                        target.at[k0 * CHUNK // PIECE + half, block][...] = fragment(re, im)

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
    """The kernel (g, spectra of the taps, f1, f2, twiddle, [31]) -> (du, H).

    g and du, each channel's share, are `(B, C, D, length, 64)`, the spectra of the taps `(D, C, lags)` of `fragments`;
    H is `spectra_of` all channels.
    """
    assert shapes.lags == (0, shapes.count - 1)
    assert GROUPS < shapes.count <= MAX_BLOCKS
    assert not shapes.pre_gates + shapes.post_gates
    schedule = Schedule(shapes, least=1)  # whose spectra are read for each row in any case
    dtype, count = shapes.dtype, shapes.count
    results = range(GROUPS), range(GROUPS, count)

    def fft_conv_streamed_backward(g, ks, f1, f2, twiddle, shift, du, h, scratch):
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

        def meet():
            """Twice in a row, after which the phase of the barrier is as before and takes no register."""
            plgpu.barrier_arrive(barriers["all"])
            plgpu.barrier_wait(barriers["all"])

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
                    plgpu.barrier_wait(barriers["g"].at[second * GROUPS + group + zero])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left the slots
                    chain = _Chain.over(scratch, functools.partial(fresh, second))
                    (a,) = chain.first([slot(second, zero).at[0]])
                    plgpu.commit_smem()  # the whole warpgroup has read g, which its spectrum replaces
                    put(chain.second([a]), lambda: slot(second, fresh(second)), dtype)

            def products():
                """Each warpgroup its own columns of all blocks, in place."""
                for ms in results:
                    # Branches, though they are always taken: the compiler would mix the products of different results.
                    pl.when(fresh() == 0)(functools.partial(products_of, ms))

            def products_of(ms):
                halves = [products_of_half(ms, half) for half in range(CHUNK // PIECE)]
                zero = fresh()
                for m, pieces in zip(ms, zip(*halves, strict=True), strict=True):
                    for plane, both in enumerate(zip(*pieces, strict=True)):
                        value = lax.concatenate(list(both), 1)
                        scratch["slots"].at[m, plane, :, columns_of_group(zero)][...] = value

            def products_of_half(ms, half):
                """Planes of the conjugate spectra of du of those blocks, of 8 columns; the first time H is kept."""
                zero, columns = fresh(), slice(half * PIECE, (half + 1) * PIECE)
                item, row, _ = schedule.at(step + zero, 0)
                channel, feature = schedule.place(item)
                piece = group * (CHUNK // PIECE) + half
                lags = range(count - ms[0])

                def taps_of(lag):
                    return load_fragment(ks.at[feature, channel, lag, piece])

                def spectrum(j):
                    block = scratch["slots"].at[j, :, :, columns_of_group(zero)]
                    planes = [load(block.at[plane])[:, columns] for plane in (0, 1)]
                    if ms[0] == 0:  # these need all
                        h.at[row, channel, feature, piece, j][...] = fragment(*planes)
                    return floats(*planes)

                ahead = [taps_of(lag) for lag in lags[:_AHEAD]]
                hs: dict[int, tuple] = {}
                ys: dict[int, tuple] = {}
                for lag in lags:
                    if lag + _AHEAD in lags:
                        ahead.append(taps_of(lag + _AHEAD))
                    c, d = floats(*parts(ahead[lag]))
                    for m in ms:
                        if m + lag >= count:
                            continue
                        if m + lag not in hs:
                            hs[m + lag] = spectrum(m + lag)
                        a, b = hs[m + lag]
                        if m not in ys:  # in an order in which each line is two fused operations
                            ys[m] = a * c + b * d, a * d - b * c
                        else:
                            re, im = ys[m]
                            ys[m] = re + a * c + b * d, im + a * d - b * c
                return [tuple(part.astype(dtype) for part in ys[m]) for m in ms]

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
                meet()
                products()
                plgpu.commit_smem()
                meet()
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
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=3 + _PIECES),
            "all": plgpu.Barrier(num_arrivals=GROUPS),
            "g": plgpu.Barrier(num_arrivals=1, num_barriers=MAX_BLOCKS),
        },
    }
    du = jax.ShapeDtypeStruct((shapes.batch, shapes.channels, shapes.features, shapes.length, TILE), dtype)
    return persistent_kernel(
        fft_conv_streamed_backward, (du, spectra_of(shapes.channels, shapes)), scratch, schedule.grid, GROUPS
    )


def taps_gradient(shapes: Shapes):
    """The kernel (X, H) -> dK, `(parts, D, C, lags, 8, *fragment_shape)` in float32, to be summed over its parts.

    Rows of the batch are shared out in parts where there are fewer features and pieces than warpgroups.
    """
    count, groups = shapes.count, 2  # of a block: sums, H in float32 and the next row take some 200 registers
    features = shapes.features * shapes.channels
    splits = max(1, min(shapes.batch, shapes.blocks * groups // (features * _PIECES)))
    share = pl.cdiv(shapes.batch, splits)
    parts_of_batch = pl.cdiv(shapes.batch, share)
    items = parts_of_batch * features * _PIECES
    grid = min(shapes.blocks, pl.cdiv(items, groups))

    def fft_conv_streamed_taps_gradient(xs, hs, out, scratch):
        @pl.loop(0, pl.cdiv(items, grid * groups))
        def _(turn):
            item = (turn * grid + lax.axis_index("block")) * groups + lax.axis_index("warpgroup")
            # Neighbours in memory come at once.
            piece, of_features = lax.rem(item, _PIECES), item // _PIECES
            channel, feature = lax.rem(of_features, shapes.channels), of_features // shapes.channels
            part, feature = feature // shapes.features, lax.rem(feature, shapes.features)
            first = part * share

            def load_row(row):
                row = jnp.minimum(row, shapes.batch - 1)
                x = xs.at[row, channel if shapes.sequences > 1 else 0, feature, piece]
                h = hs.at[row, channel, feature, piece]
                return [load_fragment(source.at[block]) for source in (x, h) for block in range(count)]

            def add(row, carried):
                """This row's products, while the next one is on its way."""
                this, sums = carried
                following = load_row(row + 1)
                h = [floats(*parts(fragment)) for fragment in this[count:]]
                sums = [sums[at : at + 2] for at in range(0, 2 * count, 2)]
                for s in range(count):
                    a, b = floats(*parts(this[s]))
                    for lag in range(count - s):
                        (c, d), (re, im) = h[lag + s], sums[lag]
                        sums[lag] = re + a * c + b * d, im + a * d - b * c  # conj(X) H
                return following, [part for pair in sums for part in pair]

            @pl.when(item < items)
            def _():
                nothing = plgpu.layout_cast(jnp.zeros((N1, PIECE), F32), plgpu.Layout.WGMMA)
                last = jnp.minimum(first + share, shapes.batch)
                _, sums = lax.fori_loop(first, last, add, (load_row(first), [nothing] * (2 * count)))
                for lag in range(count):
                    out.at[part, feature, channel, lag, piece][...] = fragment(*sums[2 * lag : 2 * lag + 2])

    out = jax.ShapeDtypeStruct((parts_of_batch, *shapes.spectra, _PIECES, *fragment_shape(F32)), F32)
    return persistent_kernel(fft_conv_streamed_taps_gradient, out, {}, grid, groups)
