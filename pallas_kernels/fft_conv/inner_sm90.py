"""Kernels for Hopper between the outer stages of a long sequence: one short convolution for each row of Z.

`outer_plan` has the algebra. A row is 64 x 64 complex points and goes through the chain of `kernel_sm90`, whose first
and last product are complex here, 8 real products of 64 x 64 x 64 instead of 4. Rows are complex, so nothing wraps into
an imaginary part that nobody reads: the transform's shift, another one for each of the m rows of a sequence, keeps what
belongs to it.

An item is a row k1 of Z, a channel and a feature, for all of the batch or a share of it. The tables belong to k1, so a
block takes consecutive items, k1 slowest, and fetches tables only where k1 changes, and the next item's spectrum of the
taps while it works on one. Each warpgroup has a row to itself.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.chain import conj_correlate, conj_times, correlate, opaque_zeros
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.mosaic import (
    CHUNK,
    F32,
    by_columns,
    complex_planes,
    matrices,
    persistent_kernel,
    sums_of_products,
)

_SPECTRUM_SLOTS = 2


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a kernel is compiled for.

    Attributes:
      batch, channels, features: B, C and D.
      rows: m, those of Z.
      dtype: of Z, the tables and the result: bfloat16 or float16.
      sequences: 1 if the channels share Z, C if each has its own.
      warpgroups: of a block, each with a row to itself.
      blocks: in the persistent grid.
    """

    batch: int
    channels: int
    features: int
    rows: int
    dtype: Any
    sequences: int = 1
    warpgroups: int = 4
    blocks: int = 132

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """`(B, C, D, re | im m, 64, 64)`."""
        return jax.ShapeDtypeStruct((self.batch, self.channels, self.features, 2 * self.rows, N1, TILE), self.dtype)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """Which item and which row of the batch a warpgroup works on at each step."""

    shapes: Shapes

    @property
    def spectra(self):
        """Of the taps, for each row of Z."""
        return self.shapes.channels * self.shapes.features

    @property
    def splits(self):
        """Blocks that share a spectrum's batch, where there are fewer spectra than blocks."""
        turns = pl.cdiv(self.shapes.batch, self.shapes.warpgroups)
        return max(1, min(self.shapes.blocks // (self.spectra * self.shapes.rows), turns))

    @property
    def batch(self):
        """Rows of the batch of one item."""
        return pl.cdiv(self.shapes.batch, self.splits)

    @property
    def items(self):
        return self.shapes.rows * self.spectra * self.splits

    @property
    def visits(self):
        """Items of a block; the last blocks may have fewer."""
        return pl.cdiv(self.items, min(self.shapes.blocks, self.items))

    @property
    def grid(self):
        return pl.cdiv(self.items, self.visits)

    @property
    def rounds(self):
        """Steps that a warpgroup spends on one item."""
        return pl.cdiv(self.batch, self.shapes.warpgroups)

    def item(self, visit):
        return lax.axis_index("block") * self.visits + visit

    def at(self, step):
        """(item, row of the batch, whether there is any work) of this warpgroup."""
        item = self.item(step // self.rounds)
        turn = lax.rem(step, self.rounds) * self.shapes.warpgroups + lax.axis_index("warpgroup")
        row = lax.rem(item, self.splits) * self.batch + turn
        inside = (step < self.visits * self.rounds) & (item < self.items)
        return item, row, inside & (turn < self.batch) & (row < self.shapes.batch)

    def place(self, item):
        """(k1, channel, feature) of an item."""
        k1, spectrum = item // (self.spectra * self.splits), lax.rem(item // self.splits, self.spectra)
        return k1, spectrum // self.shapes.features, lax.rem(spectrum, self.shapes.features)


@dataclasses.dataclass(frozen=True)
class _Chain:
    """The transform of rows and the way back, over the tables in shared memory; `fresh()` is always zero.

    Every table is read at a zero of its own, as in `chain`.
    """

    scratch: Any
    dtype: Any
    fresh: Any

    def _f1(self, transposed=False):
        zero = self.fresh()
        planes = [self.scratch["f1"].at[zero + plane] for plane in range(3)]
        return [plane.T for plane in planes] if transposed else planes

    def _twiddle(self):
        return complex_planes(self.scratch["twiddle"], self.fresh())

    def _f2(self, back: bool):
        return column_dft.half(self.scratch["f2"], self.fresh(), back)

    def forward(self, z, then):
        """The spectrum of a row in shared memory, (re, im); `then` runs once all of the row has been read."""
        f1_re, f1_im, minus_im = self._f1()
        a = sums_of_products([(f1_re, z[0]), (minus_im, z[1])], [(f1_re, z[1]), (f1_im, z[0])])
        plgpu.commit_smem()  # the whole warpgroup has read it
        then()
        (spectrum,) = column_dft.joined([a], column_dft.there([a], self._twiddle(), self._f2(back=False), self.dtype))
        return spectrum

    def inverse(self, conjugate, result):
        """Writes the row whose conjugate spectrum this is; the place of the result carries the intermediate."""
        (e,) = column_dft.back([conjugate], self._twiddle(), self._f2(back=True), self.dtype)
        re, im = result()
        re[...], im[...] = e
        plgpu.commit_smem()
        f1_re, f1_im, minus_im = self._f1(transposed=True)
        re, im = result()
        w = sums_of_products([(f1_re, re), (f1_im, im)], [(f1_re, im), (minus_im, re)])
        plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
        re, im = result()
        re[...], im[...] = (part.astype(self.dtype) for part in w)
        plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class _Block:
    """What every kernel of rows does around the mathematics."""

    schedule: _Schedule
    scratch: Any
    rows: tuple[str, ...]

    @property
    def barriers(self):
        return self.scratch["barriers"]

    @property
    def group(self):
        return lax.axis_index("warpgroup")

    def _arrived(self, name, zero):
        return self.barriers["rows"].at[self.rows.index(name) * self.schedule.shapes.warpgroups + self.group + zero]

    def fetch(self, name, source, sequences, step, zero):
        """Starts the copy of this warpgroup's row at a step."""
        item, row, work = self.schedule.at(step)
        k1, channel, feature = self.schedule.place(item)

        @pl.when(work)
        def _():
            for plane in (0, 1):
                plgpu.copy_gmem_to_smem(
                    source.at[row, channel if sequences > 1 else 0, feature, plane * self.schedule.shapes.rows + k1],
                    self.scratch[name].at[self.group + zero, plane],
                    self._arrived(name, zero),
                )

    def await_row(self, name, zero):
        plgpu.barrier_wait(self._arrived(name, zero))

    def fetch_spectrum(self, spectrum, visit):
        item = self.schedule.item(visit)

        @pl.when((self.group == 0) & (visit < self.schedule.visits) & (item < self.schedule.items))
        def _():
            k1, channel, feature = self.schedule.place(item)
            slot = lax.rem(visit, _SPECTRUM_SLOTS)
            for plane in (0, 1):
                plgpu.copy_gmem_to_smem(
                    spectrum.at[feature, channel, k1, plane],
                    self.scratch["spectrum"].at[slot, plane],
                    self.barriers["spectrum"].at[slot],
                )

    def begin(self, f2, spectrum=None):
        """Starts the copies of what a block needs first."""

        @pl.when(self.group == 0)
        def _():
            plgpu.copy_gmem_to_smem(f2.at[0], self.scratch["f2"].at[0], self.barriers["f2"])

        if spectrum is not None:
            self.fetch_spectrum(spectrum, jnp.int32(0))
        plgpu.barrier_wait(self.barriers["f2"])

    def begin_item(self, f1, twiddle, visit, spectrum=None):
        """Waits for the item's spectrum, and its tables where they change, and starts the next spectrum's copy."""
        item = self.schedule.item(visit)
        k1 = self.schedule.place(item)[0]
        tables_change = (visit == 0) | (self.schedule.place(item - 1)[0] != k1)

        @pl.when(item < self.schedule.items)
        def _():
            plgpu.barrier_arrive(self.barriers["done"])  # all are past the last item: its tables and slot are free
            plgpu.barrier_wait(self.barriers["done"])
            if spectrum is not None:
                self.fetch_spectrum(spectrum, visit + 1)

            @pl.when(tables_change)
            def _():
                @pl.when(self.group == 0)
                def _():
                    for name, table, planes in (("f1", f1, 3), ("twiddle", twiddle, 2)):
                        for plane in range(planes):
                            plgpu.copy_gmem_to_smem(
                                table.at[k1, plane], self.scratch[name].at[plane], self.barriers["tables"]
                            )

                plgpu.barrier_wait(self.barriers["tables"])

            if spectrum is not None:
                plgpu.barrier_wait(self.barriers["spectrum"].at[lax.rem(visit, _SPECTRUM_SLOTS)])

    def taps(self, visit, zero):
        return complex_planes(self.scratch["spectrum"].at[lax.rem(visit, _SPECTRUM_SLOTS)], zero)

    def store(self, planes, target, step):
        """Starts the copy of a result to its place."""
        item, row, _ = self.schedule.at(step)
        k1, channel, feature = self.schedule.place(item)
        for plane, source in enumerate(planes):
            place = target.at[row, channel, feature, plane * self.schedule.shapes.rows + k1]
            plgpu.copy_smem_to_gmem(source, place)


def _rows(shapes: Shapes, dtype=None, layout: int | None = None):
    """Shared memory for a complex row of each warpgroup."""
    return matrices((shapes.warpgroups, 2, N1, TILE), dtype or shapes.dtype, layout)


def _spectrum(shapes: Shapes):
    """Shared memory for the taps' spectrum and the next one."""
    return matrices((_SPECTRUM_SLOTS, 2, N1, TILE), shapes.dtype, columns=CHUNK)


def _scratch(shapes: Shapes, rows: tuple[str, ...], **more):
    """Shared memory and barriers: the tables, complex rows that are copied in, and what else there is."""
    groups, dtype = shapes.warpgroups, shapes.dtype
    return dict(
        f1=matrices((3, N1, N1), dtype, columns=TILE),
        f2=matrices(column_dft.blocks_shape(TILE), dtype, columns=CHUNK),
        twiddle=matrices((2, N1, TILE), dtype, columns=CHUNK),
        **{name: _rows(shapes) for name in rows},
        **more,
        barriers={
            "f2": plgpu.Barrier(num_arrivals=1),
            "tables": plgpu.Barrier(num_arrivals=5),
            "spectrum": plgpu.Barrier(num_arrivals=2, num_barriers=_SPECTRUM_SLOTS),
            "done": plgpu.Barrier(num_arrivals=groups),
            "rows": plgpu.Barrier(num_arrivals=2, num_barriers=len(rows) * groups),
        },
    )


def forward(shapes: Shapes):
    """The kernel (z, spectrum, f1, f2, twiddle, [31]) -> w.

    z is `(B, 1 or C, D, re | im m, 64, 64)`, the spectrum of the taps `(D, C, m, 2, 64, 64)`, w like z for each
    channel; the tables are `outer_plan.inner_tables`.
    """
    schedule = _Schedule(shapes)
    dtype = shapes.dtype

    def fft_conv_inner_forward(z, spectrum, f1, f2, twiddle, shift, out, scratch):
        shift_by = shift[0]
        block = _Block(schedule, scratch, ("z",))
        block.fetch("z", z, shapes.sequences, jnp.int32(0), 0)
        block.begin(f2, spectrum)

        @pl.loop(0, schedule.visits)
        def _(visit):
            block.begin_item(f1, twiddle, visit, spectrum)

            @pl.loop(0, schedule.rounds)
            def _(turn):
                step = visit * schedule.rounds + turn
                fresh = opaque_zeros(step, shift_by)
                chain = _Chain(scratch, dtype, fresh)
                work = schedule.at(step)[-1]

                def fetch_next():
                    block.fetch("z", z, shapes.sequences, step + 1, fresh())

                @pl.when(work)
                def _():
                    block.await_row("z", fresh())
                    spectrum_of_row = chain.forward(
                        complex_planes(scratch["z"].at[block.group + fresh()], 0), fetch_next
                    )
                    product = conj_times(spectrum_of_row, block.taps(visit, fresh()), dtype)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left its place

                    def result():
                        return complex_planes(scratch["w"].at[block.group + fresh()], 0)

                    chain.inverse(product, result)
                    block.store(result(), out, step + fresh())

                pl.when(jnp.logical_not(work))(fetch_next)

        plgpu.wait_smem_to_gmem(0)

    scratch = _scratch(shapes, ("z",), w=_rows(shapes), spectrum=_spectrum(shapes))
    return persistent_kernel(fft_conv_inner_forward, shapes.result, scratch, schedule.grid, shapes.warpgroups)


def backward(shapes: Shapes):
    """The kernel (x, h, spectrum, f1, f2, twiddle, [31]) -> (w, ds): cotangents of Z and of the taps' spectrum.

    x is Z of the sequence, `(B, 1 or C, D, re | im m, 64, 64)`, h that of the cotangent of the result, for each
    channel, and with X and H their spectra

        w = F^-1(conj(K) H),    ds = sum over the batch of conj(X) H

    w is like h, each channel's share; ds is `(parts, D, C, m, 2, 64, 64)` in float32, to be summed over the parts,
    which warpgroups keep in registers.
    """
    schedule = _Schedule(shapes)
    dtype, groups = shapes.dtype, shapes.warpgroups

    def fft_conv_inner_backward(x, h, spectrum, f1, f2, twiddle, shift, out, ds, scratch):
        shift_by = shift[0]
        block = _Block(schedule, scratch, ("x", "h"))
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
                    chain = _Chain(scratch, dtype, fresh)

                    def planes(name):
                        return complex_planes(scratch[name].at[block.group + fresh()], 0)

                    block.await_row("x", fresh())
                    spectrum_of_x = chain.forward(planes("x"), lambda: fetch("x", step + 1, fresh()))
                    for part, value in zip(planes("spectra"), spectrum_of_x, strict=True):  # H needs the registers
                        part[...] = value.astype(dtype)
                    block.await_row("h", fresh())
                    spectrum_of_h = chain.forward(planes("h"), lambda: fetch("h", step + 1, fresh()))
                    # A branch, though it is always taken: ptxas would put these sums off to the end of the step.
                    kept = planes("spectra")
                    ds = lax.cond(
                        fresh() == 0, lambda ds: by_columns(correlate, *kept, *spectrum_of_h, *ds), lambda ds: ds, ds
                    )
                    conjugate = functools.partial(conj_correlate, dtype)
                    product = by_columns(conjugate, *block.taps(visit, fresh()), *spectrum_of_h)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left its place
                    chain.inverse(product, lambda: planes("w"))
                    block.store(planes("w"), out, step + fresh())
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
                for plane, total in enumerate(sums):
                    ds[part, feature, channel, k1, plane] = total

        plgpu.wait_smem_to_gmem(0)

    parts = (schedule.splits * groups, shapes.features, shapes.channels, shapes.rows, 2, N1, TILE)
    out_type = shapes.result, jax.ShapeDtypeStruct(parts, F32)
    scratch = _scratch(
        shapes, ("x", "h"), w=_rows(shapes), spectrum=_spectrum(shapes), spectra=_rows(shapes, layout=CHUNK)
    )
    return persistent_kernel(fft_conv_inner_backward, out_type, scratch, schedule.grid, shapes.warpgroups)
