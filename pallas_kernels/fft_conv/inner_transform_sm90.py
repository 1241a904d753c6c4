"""Kernels for Hopper: the halves of the inner convolution alone, for the taps of a long sequence and their gradient.

The taps of a feature are one more sequence: split, then transformed row by row, to the spectrum that the convolution
multiplies by; and the cotangent of that spectrum goes the same way back. That is a 64th of the convolution's work at a
batch of 64. All is in float16 whatever the convolution is in: numbers are divided by the largest of their sequence, and
the error, 5e-4 of the norm, is less than a third of what the spectrum's rounding to bfloat16 adds.

The batch is that of the taps' sequences here, one for each feature and channel; the rest is `inner_rows`'s schedule.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.fft_conv.chain import opaque_zeros
from pallas_kernels.fft_conv.config import TILE
from pallas_kernels.fft_conv.inner_chain import chain
from pallas_kernels.fft_conv.inner_rows import Block, Schedule, Shapes, planes, scratch_types, tiles
from pallas_kernels.fft_conv.mosaic import F32, PIECE, persistent_kernel
from pallas_kernels.fft_conv.rearranged import packed


def forward(shapes: Shapes, dtype):
    """The kernel (z, scale, f1, f2, twiddle, [31]) -> spectra `(B, m, *Shapes.spectrum)`, as planes in that dtype.

    z is `(B, 1, 1, ...)` as `Shapes.result`; the spectra of sequence b are multiplied by scale[b], in float32.
    """

    def fft_conv_inner_transform(z, scale, f1, f2, twiddle, shift, out, scratch):
        def transform(block, chain, step, row, k1, fetch_next):
            spectrum = chain.forward(block.tile("z", chain.fresh()), fetch_next)
            factor = scale[row]
            if not shapes.apart:
                for piece in range(TILE // PIECE):
                    columns = slice(piece * PIECE, (piece + 1) * PIECE)
                    out[row, k1, piece] = packed(*(part[:, columns] * factor for part in spectrum))
                return
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left its place
            for plane, part in enumerate(spectrum):
                place = scratch["w"].at[block.group + chain.fresh(), plane]
                place[...] = (part * factor).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(place, out.at[row, k1, plane])

        _each_row(shapes, scratch, z, (f1, f2, twiddle), shift, transform)

    out_type = jax.ShapeDtypeStruct((shapes.batch, shapes.rows, *shapes.spectrum), dtype if shapes.apart else F32)
    scratch = scratch_types(shapes, ("z",), **({"w": planes(shapes, dtype)} if shapes.apart else {}))
    return persistent_kernel(fft_conv_inner_transform, out_type, scratch, Schedule(shapes).grid, shapes.warpgroups)


def inverse(shapes: Shapes):
    """The kernel (s, f1, f2, twiddle, [31]) -> w, the adjoint of `forward` without its scale: both are as z there."""

    def fft_conv_inner_inverse(s, f1, f2, twiddle, shift, out, scratch):
        def transform(block, chain, step, row, k1, fetch_next):
            re, im = chain.parts(block.tile("z", chain.fresh()))
            conjugate = re, -im
            plgpu.commit_smem()  # the whole warpgroup has read it
            fetch_next()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            chain.inverse(conjugate, lambda: block.tile("w", chain.fresh()))
            block.store("w", out, step + chain.fresh(), chain.fresh())

        _each_row(shapes, scratch, s, (f1, f2, twiddle), shift, transform)

    scratch = scratch_types(shapes, ("z",), w=tiles(shapes))
    return persistent_kernel(fft_conv_inner_inverse, shapes.result, scratch, Schedule(shapes).grid, shapes.warpgroups)


def _each_row(shapes: Shapes, scratch, source, tables, shift, transform):
    """Calls transform(block, its chain, step, b, k1, fetch_next) for each row of sequence b in shared memory, "z"."""
    schedule = Schedule(shapes)
    f1, f2, twiddle = tables
    shift_by = shift[0]
    block = Block(schedule, scratch, ("z",))
    block.fetch("z", source, 1, jnp.int32(0), 0)
    block.begin(f2)

    @pl.loop(0, schedule.visits)
    def _(visit):
        block.begin_item(f1, twiddle, visit)

        @pl.loop(0, schedule.rounds)
        def _(turn):
            step = visit * schedule.rounds + turn
            transform_of_tile = chain(shapes, scratch, opaque_zeros(step, shift_by))
            item, row, work = schedule.at(step)

            def fetch_next():
                block.fetch("z", source, 1, step + 1, transform_of_tile.fresh())

            @pl.when(work)
            def _():
                block.await_tile("z", transform_of_tile.fresh())
                transform(block, transform_of_tile, step, row, schedule.place(item)[0], fetch_next)

            pl.when(jnp.logical_not(work))(fetch_next)

    plgpu.wait_smem_to_gmem(0)
