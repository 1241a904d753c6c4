"""Kernels for Hopper: the gradient of the taps of causal sequences of five to eight blocks of 4096 steps.

With the spectra X of u and H of g, the cotangent of the result (`block_toeplitz`),

    du_j = Re F^-1(sum over s of conj(K_s) H_(j+s)),      dK_l = sum over rows and s of conj(X_s) H_(l+s)

`streamed_sm90.adjoint` makes du, and leaves H in memory in the order of threads, of twice the size of u; `transform`
does the same with X. So `taps_gradient` needs neither transforms nor shared memory: a warpgroup has 8 columns of a
feature and keeps its sums in registers over the rows of the batch. All of it moves 2 + 4 + 2, 2 + 4 and 4 + 4 bytes a
step, where three passes move 6 + 6 + 12 + 6.

As sums that each row adds to memory, 256 KB of them, dK took 8.0 ms for 49,152 rows of 32,768 steps on an H200, more
than du: those of 132 features are 34 MB, which L2 does not keep beside all that comes and goes.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.block_toeplitz import Shapes, load_tables
from pallas_kernels.fft_conv.chain import correlate, floats, opaque_zeros
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, PIECE, matrices, persistent_kernel
from pallas_kernels.fft_conv.rearranged import fragment, fragment_shape, load_fragment, parts
from pallas_kernels.fft_conv.streamed_sm90 import GROUPS, PIECES, TABLE_COPIES, Chain, spectra_of, table_types


def transform(shapes: Shapes):
    """The kernel (u, f1, f2, twiddle, [31]) -> X, `spectra_of` as many sequences as u has.

    u is `(B, 1 or C, D, length, 64)`. Each warpgroup has a block to itself, and the next one on its way.
    """
    out_type = spectra_of(shapes.sequences, shapes)
    dtype, count = shapes.dtype, shapes.count
    tiles = shapes.batch * shapes.sequences * shapes.features * count
    grid = min(shapes.blocks, pl.cdiv(tiles, GROUPS))
    steps = pl.cdiv(tiles, grid * GROUPS)

    def fft_conv_streamed_transform(u, f1, f2, twiddle, shift, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers = scratch["barriers"]

        def place(step):
            """(row, sequence, feature, block) of this warpgroup, and whether there is one."""
            number = (step * grid + lax.axis_index("block")) * GROUPS + group
            sequence, block = number // count, lax.rem(number, count)
            outer, feature = sequence // shapes.features, lax.rem(sequence, shapes.features)
            where = outer // shapes.sequences, lax.rem(outer, shapes.sequences), feature, block
            return where, (step < steps) & (number < tiles)

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

            @pl.when(work)
            def _():
                fetch(step + 1)
                number = 2 * group + lax.rem(step, 2)
                plgpu.barrier_wait(barriers["u"].at[number])
                chain = Chain.over(scratch, opaque_zeros(step, shift[0]))
                (a,) = chain.first([scratch["inbox"].at[number]])
                plgpu.commit_smem()  # the whole warpgroup has read it, before the next but one takes its place
                target = out.at[row, channel, feature]
                for k0, z in enumerate(chain.second([a])):
                    for half in range(CHUNK // PIECE):
                        columns = slice(half * PIECE, (half + 1) * PIECE)
                        re, im = (part[:, columns].astype(dtype) for part in z)
                        target.at[k0 * CHUNK // PIECE + half, block][...] = fragment(re, im)

    scratch = {
        **table_types(dtype, TILE),
        "inbox": matrices((2 * GROUPS, N1, TILE), dtype),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=TABLE_COPIES),
            "u": plgpu.Barrier(num_arrivals=1, num_barriers=2 * GROUPS),
        },
    }
    return persistent_kernel(fft_conv_streamed_transform, out_type, scratch, grid, GROUPS)


def taps_gradient(shapes: Shapes):
    """The kernel (X, H) -> dK, `(parts, D, C, lags, 8, *fragment_shape)` in float32, to be summed over its parts.

    An item is 8 columns of a feature and a channel. Where there are few, the batch is shared out, so that warpgroups
    end together.
    """
    count, groups = shapes.count, 2  # of a block: sums, H in float32 and the next row take some 200 registers
    all_columns = shapes.features * shapes.channels * PIECES

    def rows_in_turn(splits: int) -> int:
        """Of the warpgroup that has the most."""
        share = pl.cdiv(shapes.batch, splits)
        return share * pl.cdiv(pl.cdiv(shapes.batch, share) * all_columns, shapes.blocks * groups)

    most = max(1, min(shapes.batch, 4 * shapes.blocks * groups // all_columns))
    share = pl.cdiv(shapes.batch, min(range(1, most + 1), key=rows_in_turn))
    splits = pl.cdiv(shapes.batch, share)
    items = splits * all_columns
    grid = min(shapes.blocks, pl.cdiv(items, groups))

    def fft_conv_streamed_taps_gradient(xs, hs, out, scratch):
        @pl.loop(0, pl.cdiv(items, grid * groups))
        def _(turn):
            item = (turn * grid + lax.axis_index("block")) * groups + lax.axis_index("warpgroup")
            # Neighbours in memory come at once.
            piece, of_features = lax.rem(item, PIECES), item // PIECES
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
                x, h = ([floats(*parts(fragment)) for fragment in of_one] for of_one in (this[:count], this[count:]))
                pairs = [sums[at : at + 2] for at in range(0, 2 * count, 2)]
                for s in range(count):
                    for lag in range(count - s):
                        pairs[lag] = correlate(*x[s], *h[lag + s], *pairs[lag])
                return following, [part for pair in pairs for part in pair]

            @pl.when(item < items)
            def _():
                nothing = plgpu.layout_cast(jnp.zeros((N1, PIECE), F32), plgpu.Layout.WGMMA)
                last = jnp.minimum(first + share, shapes.batch)
                _, sums = lax.fori_loop(first, last, add, (load_row(first), [nothing] * (2 * count)))
                for lag in range(count):
                    out.at[part, feature, channel, lag, piece][...] = fragment(*sums[2 * lag : 2 * lag + 2])

    out = jax.ShapeDtypeStruct((splits, *shapes.spectra, PIECES, *fragment_shape(F32)), F32)
    return persistent_kernel(fft_conv_streamed_taps_gradient, out, {}, grid, groups)
