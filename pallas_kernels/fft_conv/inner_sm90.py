"""Kernels for Hopper between the outer stages of a long sequence: one short convolution for each row of Z.

`outer_plan` has the algebra, `inner_chain` the transform of a tile of rows, `inner_rows` what is around it. The product
with the taps' spectrum comes between a transform and its way back; of the way back of the convolution two transforms
come before, and the sums of their products stay in registers.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.chain import correlate, opaque_zeros
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.inner_chain import chain
from pallas_kernels.fft_conv.inner_rows import Block, Schedule, Shapes, planes, scratch_types, spectrum_slots, tiles
from pallas_kernels.fft_conv.mosaic import F32, by_columns, complex_planes, persistent_kernel


def forward(shapes: Shapes):
    """The kernel (z, spectrum, f1, f2, twiddle, [31]) -> w.

    z is `(B, 1 or C, D, re | im m, 64, 64)` or `(B, 1 or C, D, m, re | im 32, width)`, as `Shapes.result`, the spectrum
    of the taps `(D, C, m, *Shapes.spectrum)`, w like z for each channel; the tables are `outer_plan.inner_tables`.
    """
    schedule = Schedule(shapes)

    def fft_conv_inner_forward(z, spectrum, f1, f2, twiddle, shift, out, scratch):
        shift_by = shift[0]
        block = Block(schedule, scratch, ("z",))
        block.fetch("z", z, shapes.sequences, jnp.int32(0), 0)
        block.begin(f2, spectrum)

        @pl.loop(0, schedule.visits)
        def _(visit):
            block.begin_item(f1, twiddle, visit, spectrum)

            @pl.loop(0, schedule.rounds)
            def _(turn):
                step = visit * schedule.rounds + turn
                fresh = opaque_zeros(step, shift_by)
                transform = chain(shapes, scratch, fresh)
                work = schedule.at(step)[-1]

                def fetch_next():
                    block.fetch("z", z, shapes.sequences, step + 1, fresh())

                @pl.when(work)
                def _():
                    block.await_tile("z", fresh())
                    spectrum_of_tile = transform.forward(block.tile("z", fresh()), fetch_next)
                    product = transform.times(spectrum_of_tile, block.taps(visit, fresh()))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left its place
                    transform.inverse(product, lambda: block.tile("w", fresh()))
                    block.store("w", out, step + fresh(), fresh())

                pl.when(jnp.logical_not(work))(fetch_next)

        plgpu.wait_smem_to_gmem(0)

    scratch = scratch_types(shapes, ("z",), w=tiles(shapes), spectrum=spectrum_slots(shapes))
    return persistent_kernel(fft_conv_inner_forward, shapes.result, scratch, schedule.grid, shapes.warpgroups)


def backward(shapes: Shapes):
    """The kernel (x, h, spectrum, f1, f2, twiddle, [31]) -> (w, ds): cotangents of Z and of the taps' spectrum.

    x is Z of the sequence, like z of `forward`, h that of the cotangent of the result, for each channel, and with X and
    H their spectra

        w = F^-1(conj(K) H),    ds = sum over the batch of conj(X) H

    w is like h, each channel's share; ds is `(parts, D, C, m, re | im, 64, 64)` or `(parts, D, C, m, 1, 64, 64)`, whose
    rows are those of `Paired`, in float32, to be summed over the parts, which warpgroups keep in registers.

    Raises:
      NotImplementedError: for wide rows.
    """
    if shapes.width != TILE:
        raise NotImplementedError(f"the sums of rows of {shapes.width} columns have no registers.")
    schedule = Schedule(shapes)
    dtype, groups = shapes.dtype, shapes.warpgroups

    def fft_conv_inner_backward(x, h, spectrum, f1, f2, twiddle, shift, out, ds, scratch):
        shift_by = shift[0]
        block = Block(schedule, scratch, ("x", "h"))
        sources = {"x": (x, shapes.sequences), "h": (h, shapes.channels)}

        def fetch(name, step, zero):
            block.fetch(name, *sources[name], step, zero)

        for name in sources:
            fetch(name, jnp.int32(0), 0)
        block.begin(f2, spectrum)

        @pl.loop(0, schedule.visits)
        def _(visit):
            block.begin_item(f1, twiddle, visit, spectrum)

            def turn(turn, ds):
                step = visit * schedule.rounds + turn
                work = schedule.at(step)[-1]

                def one(ds):
                    fresh = opaque_zeros(step, shift_by)
                    transform = chain(shapes, scratch, fresh)

                    def tile(name):
                        return block.tile(name, fresh())

                    def spectra():
                        return complex_planes(scratch["spectra"].at[block.group + fresh()], 0)

                    block.await_tile("x", fresh())
                    spectrum_of_x = transform.forward(tile("x"), lambda: fetch("x", step + 1, fresh()))
                    for part, value in zip(spectra(), spectrum_of_x, strict=True):  # H needs the registers
                        part[...] = value.astype(dtype)
                    block.await_tile("h", fresh())
                    spectrum_of_h = transform.forward(tile("h"), lambda: fetch("h", step + 1, fresh()))
                    # A branch, though it is always taken: ptxas would put these sums off to the end of the step.
                    kept = spectra()
                    ds = lax.cond(
                        fresh() == 0, lambda ds: by_columns(correlate, *kept, *spectrum_of_h, *ds), lambda ds: ds, ds
                    )
                    product = transform.correlated(spectrum_of_h, block.taps(visit, fresh()))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left its place
                    transform.inverse(product, lambda: tile("w"))
                    block.store("w", out, step + fresh(), fresh())
                    return ds

                def rest(ds):
                    for name in sources:
                        fetch(name, step + 1, 0)
                    return ds

                return lax.cond(work, one, rest, ds)

            nothing = plgpu.layout_cast(jnp.zeros((N1, TILE), F32), plgpu.Layout.WGMMA)
            sums = lax.fori_loop(0, schedule.rounds, turn, (nothing, nothing))
            item = schedule.item(visit)

            @pl.when(item < schedule.items)
            def _():
                k1, channel, feature = schedule.place(item)
                part = lax.rem(item, schedule.splits) * groups + block.group
                for plane, total in enumerate(chain(shapes, scratch, None).summed(sums)):
                    ds[part, feature, channel, k1, plane] = total

        plgpu.wait_smem_to_gmem(0)

    parts = (schedule.splits * groups, shapes.features, shapes.channels, shapes.rows, shapes.planes, N1, TILE)
    out_type = shapes.result, jax.ShapeDtypeStruct(parts, F32)
    scratch = scratch_types(
        shapes, ("x", "h"), w=tiles(shapes), spectrum=spectrum_slots(shapes), spectra=planes(shapes)
    )
    return persistent_kernel(fft_conv_inner_backward, out_type, scratch, schedule.grid, shapes.warpgroups)
