"""The forward kernel between the outer stages of a learned long sequence: one short convolution for each row.

With the blocks F1 and V1 and the twiddle T of a row k0, F2 and V2 of all rows (`learned_three_pass` has the algebra), a
complex row Z and its share K of the taps' spectrum,

    C = (T * (F1 Z)) F2,      W = V1 (conj(T) * ((C * K) V2))

16 products of real 64 x 64 matrices a row, where fixed blocks take 8 and two that a radix of 4 has shrunk. A block of
threads loads the tables of its k0 once (`learned_rows`), 96 KB of its memory; the rest is for two spectra of the taps
and, for each of three warpgroups, a row and a result.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.chain import floats, opaque_zeros, times
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.learned_rows import Schedule, Shapes
from pallas_kernels.fft_conv.mosaic import (
    CHUNK,
    by_columns,
    complex_planes,
    matrices,
    persistent_kernel,
    sums_of_products,
)

WARPGROUPS = 3
"""Of a block, each with a row to itself: as many as have shared memory."""

_SPECTRUM_SLOTS = 2
"""Of the taps' spectrum: one in use and one on its way."""

SHARED_MEMORY = 224 * 1024
"""Bytes of a block's matrices."""


class Tables(NamedTuple):
    """What the kernel keeps in shared memory, of its k0; blocks are scaled as in `tables`."""

    f1: Any
    """`(m, re | im | -im, 64, 64)`, `[k1, n1]`."""
    f2: Any
    """`(re | im, 64, 64)`, `[n2, k2]`."""
    f1_back: Any
    """V1, `(m, re | im | -im, 64, 64)`, `[n1, k1]`."""
    f2_back: Any
    """V2, `(re | im, 64, 64)`, `[k2, n2]`."""
    twiddle: Any
    """`(m, re | im, 64, 64)`."""


_PLANES = {"f1": 3, "f2": 2, "f1_back": 3, "f2_back": 2, "twiddle": 2}


def _times_conjugate(z, w, dtype):
    """The product z conj(w) of (real, imaginary) pairs, computed in float32."""

    def product(a, b, c, d):
        a, b, c, d = floats(a, b, c, d)
        return (a * c + b * d).astype(dtype), (b * c - a * d).astype(dtype)

    return by_columns(product, *z, *w)


def _left(block, z):
    """A block, re | im | -im, times z, both in shared memory: in float32."""
    re, im, minus_im = block
    return sums_of_products([(re, z[0]), (minus_im, z[1])], [(re, z[1]), (im, z[0])])


def _right(z, block):
    """z, in registers and of 16 bits, times a block, re | im, in shared memory."""
    re, im = block
    return sums_of_products([(z[0], re), (-z[1], im)], [(z[0], im), (z[1], re)])


@dataclasses.dataclass(frozen=True)
class Rows:
    """A warpgroup's rows, one after the other, and what becomes of each on the way there.

    Attributes:
      schedule: which they are.
      z: where they are in memory, as `Shapes.sequences`.
      scratch: with `scratch_types`.
      group: this warpgroup.
      k0: of this block.
    """

    schedule: Schedule
    z: Any
    scratch: dict[str, Any]
    group: Any
    k0: Any

    def fetch(self, step, zero):
        """Starts the copy of the row at a step."""
        feature, sequence, work = self.schedule.at(step, self.group)

        @pl.when(work)
        def _():
            for plane in (0, 1):
                plgpu.copy_gmem_to_smem(
                    self.z.at[sequence, 0, feature, plane * self.schedule.shapes.rows + self.k0],
                    self.scratch["z"].at[self.group + zero, plane],
                    self.scratch["barriers"]["rows"].at[self.group + zero],
                )

    def fetch_tables(self, tables: dict[str, Any]):
        """Lets the first warpgroup start their copies, of those `(m, planes, 64, 64)` of the share of k0."""

        @pl.when(self.group == 0)
        def _():
            for name, table in tables.items():
                planes = table if len(table.shape) == 3 else table.at[self.k0]
                for plane in range(_PLANES[name]):
                    target = self.scratch[name].at[plane]
                    plgpu.copy_gmem_to_smem(planes.at[plane], target, self.scratch["barriers"]["tables"])

    def block(self, name: str, zero):
        """The planes of a table."""
        return [self.scratch[name].at[zero + plane] for plane in range(_PLANES[name])]

    def row(self, name: str, zero):
        """Both parts of the row, "z", or of the result, "w"."""
        return complex_planes(self.scratch[name].at[self.group + zero], 0)

    def spectrum(self, step, fresh):
        """C of the row at a step, whose copy has started, in float32; starts that of the next row."""
        # One slot of a row is read by products alone. A product is over, for all four warps, at the commit after its
        # wait; only then may the next copy write there.
        plgpu.barrier_wait(self.scratch["barriers"]["rows"].at[self.group + fresh()])
        a = _left(self.block("f1", fresh()), self.row("z", fresh()))
        plgpu.commit_smem()
        self.fetch(step + 1 + fresh(), fresh())
        turned = times(a, self.block("twiddle", fresh()), self.schedule.shapes.dtype)
        return _right(turned, self.block("f2", fresh()))

    def each(self, shift_by, work_on, begin_item=lambda visit: None):
        """Calls begin_item(visit) and, for every row of the item, work_on(visit, step, fresh); awaits all copies."""
        schedule = self.schedule

        @pl.loop(0, schedule.visits)
        def _(visit):
            begin_item(visit)

            @pl.loop(0, schedule.rounds)
            def _(turn):
                step = visit * schedule.rounds + turn
                _, _, work = schedule.at(step, self.group)
                fresh = opaque_zeros(step, shift_by)  # lest both branches' addresses be kept through the longer one
                lax.cond(work, lambda: work_on(visit, step, fresh), lambda: self.fetch(step + 1 + fresh(), 0))

        plgpu.wait_smem_to_gmem(0)


def scratch_types(schedule: Schedule, tables: tuple[str, ...], result_dtype, **barriers):
    """Shared memory of a kernel with these tables, a row and a result for each warpgroup."""
    dtype, groups = schedule.shapes.dtype, schedule.workers
    columns = {"twiddle": CHUNK}
    return {
        **{name: matrices((_PLANES[name], N1, N1), dtype, columns=columns.get(name, TILE)) for name in tables},
        "z": matrices((groups, 2, N1, TILE), dtype),
        "w": matrices((groups, 2, N1, TILE), result_dtype),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=sum(_PLANES[name] for name in tables)),
            "rows": plgpu.Barrier(num_arrivals=2, num_barriers=groups),
            **barriers,
        },
    }


def forward(shapes: Shapes):
    """The kernel (z, spectrum, f1, f2, f1_back, f2_back, twiddle, [31]) -> w, of the `Tables`.

    z and w are `(B, 1, D, re | im m, 64, 64)`, the spectrum of the taps `(D, m, re | im, 64, 64)`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> shapes = Shapes(2, 3, 4, jnp.bfloat16)
      >>> table = lambda *leading: jax.ShapeDtypeStruct((*leading, 64, 64), jnp.bfloat16)
      >>> tables = table(4, 3), table(2), table(4, 3), table(2), table(4, 2)
      >>> shift = jax.ShapeDtypeStruct((1,), jnp.int32)
      >>> jax.eval_shape(forward(shapes), shapes.sequences, table(3, 4, 2), *tables, shift).shape
      (2, 1, 3, 8, 64, 64)
    """
    schedule = Schedule(shapes, WARPGROUPS)
    dtype, m = shapes.dtype, shapes.rows

    def learned_rows_forward(z, spectrum, *refs, scratch):
        *tables, shift, out = refs
        group, k0, barriers = lax.axis_index("warpgroup"), schedule.k0, scratch["barriers"]
        rows = Rows(schedule, z, scratch, group, k0)

        def fetch_spectrum(visit):
            item = schedule.item(visit)

            @pl.when((group == 0) & (item < schedule.items))
            def _():
                feature, _ = schedule.place(item)
                slot = lax.rem(visit, _SPECTRUM_SLOTS)
                for plane in (0, 1):
                    plgpu.copy_gmem_to_smem(
                        spectrum.at[feature, k0, plane],
                        scratch["spectrum"].at[slot, plane],
                        barriers["spectrum"].at[slot],
                    )

        def begin_item(visit):
            """Waits for the item's spectrum, and starts the next one's copy."""

            @pl.when(schedule.item(visit) < schedule.items)
            def _():
                plgpu.barrier_arrive(barriers["done"])  # all are past the last item, whose slot is free
                plgpu.barrier_wait(barriers["done"])
                fetch_spectrum(visit + 1)
                plgpu.barrier_wait(barriers["spectrum"].at[lax.rem(visit, _SPECTRUM_SLOTS)])

        rows.fetch(jnp.int32(0), 0)
        rows.fetch_tables(Tables(*tables)._asdict())
        fetch_spectrum(jnp.int32(0))
        plgpu.barrier_wait(barriers["tables"])

        def convolve(visit, step, fresh):
            c = rows.spectrum(step, fresh)
            taps = complex_planes(scratch["spectrum"].at[lax.rem(visit, _SPECTRUM_SLOTS)], fresh())
            q = _right(times(c, taps, dtype), rows.block("f2_back", fresh()))
            e = _times_conjugate(q, rows.block("twiddle", fresh()), dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left its place
            for part, value in zip(rows.row("w", fresh()), e, strict=True):
                part[...] = value
            plgpu.commit_smem()
            w = _left(rows.block("f1_back", fresh()), rows.row("w", fresh()))
            plgpu.commit_smem()  # all four warps have read what the result replaces
            for part, value in zip(rows.row("w", fresh()), w, strict=True):
                part[...] = value.astype(dtype)
            plgpu.commit_smem()
            feature, sequence, _ = schedule.at(step + fresh(), group)
            for plane, part in enumerate(rows.row("w", fresh())):
                plgpu.copy_smem_to_gmem(part, out.at[sequence, 0, feature, plane * m + k0])

        rows.each(shift[0], convolve, begin_item)

    scratch = scratch_types(
        schedule,
        Tables._fields,
        dtype,
        spectrum=plgpu.Barrier(num_arrivals=2, num_barriers=_SPECTRUM_SLOTS),
        done=plgpu.Barrier(num_arrivals=WARPGROUPS),
    )
    scratch["spectrum"] = matrices((_SPECTRUM_SLOTS, 2, N1, TILE), dtype, columns=CHUNK)
    return persistent_kernel(learned_rows_forward, shapes.sequences, scratch, schedule.grid, WARPGROUPS)
