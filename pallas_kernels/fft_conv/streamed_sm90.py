"""The kernels for Hopper and causal sequences of five to eight blocks of 4096 steps: spectra of the taps come from L2.

It is the scheme of `block_toeplitz`, Y_m = sum_j K_(m-j) X_j, for more spectra than leave room for those of the taps.
Each of four warpgroups transforms two blocks, one after the other, and does the products of 16 columns for all of them,
8 at a time. Blocks 4 to 7 of the result come first, which need all of X, and then the others, which need only
themselves; of the adjoint, which has m + j for m - j, it is the other way round. From one lag to the next four results
need three of the same X and one more, so four of them stay in registers in float32, and each is read and converted once
or twice for its 8 products at most.

The taps' spectra never come to shared memory: they are `fragments`, which a thread loads from L2 into registers, both
parts of 8 columns by one load, two lags ahead of their products. All of it is some 1,850 instructions of a warp and
row, of which 1,150 are products; by a ring of pieces in shared memory, with X read for each product, it was 3,140.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.block_toeplitz import (
    Schedule,
    Shapes,
    add_conj_product,
    inverse,
    load_columns,
    load_tables,
    put,
    put_columns,
)
from pallas_kernels.fft_conv.chain import ByColumns, apply_gate, floats
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, PIECE, complex_planes, load, matrices, persistent_kernel
from pallas_kernels.fft_conv.rearranged import fragment, fragment_shape, fragments, load_fragment, parts
from pallas_kernels.fft_conv.tables import convolution_tables

GROUPS = 4
MAX_BLOCKS = 2 * GROUPS
"""As many spectra, 128 KB, fit beside the tables."""

PIECES = TILE // PIECE
_AHEAD = 2
"""Fragments of the taps' spectra that are on their way while one is in work."""


def tables(dtype, f1, f2, twiddle, shift):
    """Those of the kernel from those of `tables.dft_tables` in float32; twiddle factors stay in it."""
    f1, f2, twiddle = convolution_tables(f1, f2, twiddle)
    return f1[:2].astype(dtype), f2.astype(dtype), fragments(*twiddle), shift


TABLE_COPIES = 3 + PIECES
"""That bring the tables."""


def table_types(dtype, columns: int = CHUNK):
    """Shared memory for them, F1 laid out for a product with so many columns of a sequence."""
    return {
        "f1": matrices((2, N1, N1), dtype, columns=columns),
        "f2": matrices(column_dft.blocks_shape(TILE), dtype, columns=CHUNK),
        "twiddle": plgpu.SMEM((PIECES, *fragment_shape(F32)), F32),
    }


class Chain(ByColumns):
    """Whose twiddle factors are `fragments` in float32."""

    def first_block(self, transposed: bool = False):
        """F1 of wide rows: fragments do not tell how wide."""
        return tuple(plane.T if transposed else plane for plane in complex_planes(self.f1, self.fresh()))

    def _twiddles(self):
        zero, radix = self.fresh(), column_dft.radix(TILE)
        return lambda piece: [parts(load_fragment(self.twiddle.at[zero + piece * radix + b1])) for b1 in range(radix)]


def spectra_of(sequences: int, shapes: Shapes) -> jax.ShapeDtypeStruct:
    """Spectra `(B, 1 or C, D, 8, blocks)` of `fragments`, of so many sequences of a feature.

    What a warpgroup of `streamed_gradient_sm90` sums up lies together.
    """
    shape = shapes.batch, sequences, shapes.features, PIECES, shapes.count, *fragment_shape(shapes.dtype)
    return jax.ShapeDtypeStruct(shape, shapes.dtype)


def forward(shapes: Shapes):
    """The kernel (u, pre gate, post gate, spectra of the taps, f1, f2, twiddle, [31]) -> y.

    u is `(B, 1 or C, D, length, 64)`, the spectra `(D, C, lags)` of `fragments`, `(8, 128, 8)` each, y
    `(B, C, D, length, 64)`. An absent gate is not read. Lags are those of a causal convolution.
    """
    body = _body(shapes, backwards=False)

    def fft_conv_streamed_forward(u, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, out, scratch):
        body(u, pre_gate, post_gate, spectrum, (f1, f2, twiddle), shift, out, None, scratch)

    return _launch(fft_conv_streamed_forward, shapes, _result(shapes))


def adjoint(shapes: Shapes):
    """The kernel (g, spectra of the taps, f1, f2, twiddle, [31]) -> (du, H), without gates.

    g, the cotangent of the result, and du, each channel's share, are `(B, C, D, length, 64)`; H, the spectra of g, is
    `spectra_of` all channels. `forward` says what the spectra of the taps are.
    """
    assert not shapes.pre_gates + shapes.post_gates
    shapes = dataclasses.replace(shapes, sequences=shapes.channels)
    body = _body(shapes, backwards=True)

    def fft_conv_streamed_adjoint(g, spectrum, f1, f2, twiddle, shift, du, h, scratch):
        body(g, None, None, spectrum, (f1, f2, twiddle), shift, du, h, scratch)

    return _launch(fft_conv_streamed_adjoint, shapes, (_result(shapes), spectra_of(shapes.channels, shapes)))


def _result(shapes: Shapes):
    return jax.ShapeDtypeStruct((shapes.batch, shapes.channels, shapes.features, shapes.length, TILE), shapes.dtype)


def _schedule(shapes: Shapes):
    return Schedule(shapes, least=1)  # whose spectra are read for each row in any case


def _body(shapes: Shapes, backwards: bool):
    """That of `forward` or `adjoint`, which leaves its sequences' spectra in `kept`."""
    assert shapes.lags == (0, shapes.count - 1)
    assert GROUPS < shapes.count <= MAX_BLOCKS
    schedule = _schedule(shapes)
    dtype, count = shapes.dtype, shapes.count
    # Results that need the spectra in the place of the others come first.
    results = (range(GROUPS), range(GROUPS, count))[:: 1 if backwards else -1]

    def body(u, pre_gate, post_gate, spectrum, tables, shift, out, kept, scratch):
        shift_by = shift[0]
        group = lax.axis_index("warpgroup")
        barriers = scratch["barriers"]

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
                barrier = barriers["rows"].at[second * GROUPS + group + zero]
                plgpu.copy_gmem_to_smem(source, slot(second, zero).at[0], barrier)

        def fetch_gate(step, second, gate, sequences, zero):
            """Starts the copy of that block of a gate; `sequences` is 1 or C."""
            if not sequences:
                return
            item, row, work = schedule.at(step + zero, 0)
            channel, feature = schedule.place(item)

            @pl.when(work & exists(second))
            def _():
                source = gate.at[row, channel if sequences > 1 else 0, feature, block_rows(second, zero)]
                barrier = barriers["rows"].at[MAX_BLOCKS + group + zero]
                plgpu.copy_gmem_to_smem(source, scratch["gates"].at[group + zero], barrier)

        def gate_here(zero):
            """Waits for it."""
            plgpu.barrier_wait(barriers["rows"].at[MAX_BLOCKS + group + zero])
            return load_columns(scratch["gates"].at[group + zero])

        def columns_of_group(zero):
            return pl.ds(pl.multiple_of((group + zero) * CHUNK, CHUNK), CHUNK)

        fetch_gate(jnp.int32(0), 0, pre_gate, shapes.pre_gates, 0)
        for second in (0, 1):
            fetch_u(jnp.int32(0), second, 0)

        @pl.when(group == 0)
        def _():
            f1, f2, twiddle = tables
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
                    plgpu.barrier_wait(barriers["rows"].at[second * GROUPS + group + zero])
                    x = slot(second, zero).at[0]
                    if shapes.pre_gates:
                        put_columns(x, apply_gate(load_columns(x), gate_here(fresh(second)), dtype))
                        plgpu.commit_smem()
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left the slots
                    chain = Chain.over(scratch, functools.partial(fresh, second))
                    (a,) = chain.first([x])
                    plgpu.commit_smem()  # the whole warpgroup has read x, which its spectrum replaces

                    next_gate = functools.partial(fetch_gate, step, 1, pre_gate, shapes.pre_gates, fresh(second))
                    pl.when(second == 0)(next_gate)
                    place = slot(second, fresh(second))
                    put(chain.second([a]), lambda: place, dtype)

            def products():
                """Each warpgroup its own columns of all blocks, in place."""
                for ms in results:
                    # Branches, though they are always taken: the compiler would mix the products of different results
                    # and spill what it keeps for them.
                    pl.when(fresh() == 0)(functools.partial(products_of, ms))

            def products_of(ms):
                halves = [products_of_half(ms, half) for half in range(CHUNK // PIECE)]
                for m, pieces in zip(ms, zip(*halves, strict=True), strict=True):
                    zero = fresh()  # with one for all results, 8 blocks with gates in float16 have 8 bytes of stack
                    for plane, both in enumerate(zip(*pieces, strict=True)):
                        value = lax.concatenate(list(both), 1)
                        scratch["slots"].at[m, plane, :, columns_of_group(zero)][...] = value

            def products_of_half(ms, half):
                """Planes of conj(Y_m) of those results, of 8 columns."""
                zero = fresh()
                item, row, _ = schedule.at(step + zero, 0)
                channel, feature = schedule.place(item)
                piece, columns = group * (CHUNK // PIECE) + half, slice(half * PIECE, (half + 1) * PIECE)
                lags = range(count - ms[0] if backwards else ms[-1] + 1)

                def taps_of(lag):
                    return load_fragment(spectrum.at[feature, channel, lag, piece])

                def spectrum_of(j):
                    block = scratch["slots"].at[j, :, :, columns_of_group(zero)]
                    planes = [load(block.at[plane])[:, columns] for plane in (0, 1)]
                    if backwards and ms == results[0]:  # which need all
                        kept.at[row, channel, feature, piece, j][...] = fragment(*planes)
                    return floats(*planes)

                ahead = [taps_of(lag) for lag in lags[:_AHEAD]]
                xs: dict[int, tuple] = {}
                ys: dict[int, tuple] = {}
                for lag in lags:
                    if lag + _AHEAD in lags:
                        ahead.append(taps_of(lag + _AHEAD))
                    k = floats(*parts(ahead[lag]))
                    for m in ms:
                        j = m + lag if backwards else m - lag
                        if j not in range(count):
                            continue
                        if j not in xs:
                            xs[j] = spectrum_of(j)
                        ys[m] = add_conj_product(ys.get(m), xs[j], k, backwards)
                return [tuple(part.astype(dtype) for part in ys[m]) for m in ms]

            def transform_back(second):
                @pl.when(exists(second))
                def _():
                    mine = slot(second, fresh(second))
                    chain = Chain.over(scratch, functools.partial(fresh, second))
                    y = inverse(chain, [mine.at[plane] for plane in (0, 1)], slot(second, fresh(second)))
                    zero = fresh(second)
                    mine = slot(second, zero)
                    if shapes.post_gates:
                        y = apply_gate(y, gate_here(fresh(second)), dtype)
                    plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
                    put_columns(mine.at[1], y.astype(dtype))
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
                fetch_gate(step, 0, post_gate, shapes.post_gates, fresh())
                if not shapes.post_gates:
                    fetch_gate(step + 1, 0, pre_gate, shapes.pre_gates, fresh())
                meet()
                products()
                plgpu.commit_smem()
                meet()
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

    return body


def _launch(kernel, shapes: Shapes, out_type):
    dtype = shapes.dtype
    scratch = {
        **table_types(dtype),
        "slots": matrices((MAX_BLOCKS, 2, N1, TILE), dtype, columns=CHUNK),
        "gates": matrices((GROUPS, N1, TILE), dtype, columns=CHUNK),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=TABLE_COPIES),
            "all": plgpu.Barrier(num_arrivals=GROUPS),
            # Of one array the phases take one register: those of the gates follow those of the blocks.
            "rows": plgpu.Barrier(num_arrivals=1, num_barriers=MAX_BLOCKS + GROUPS),
        },
    }
    return persistent_kernel(kernel, out_type, scratch, _schedule(shapes).grid, GROUPS)
