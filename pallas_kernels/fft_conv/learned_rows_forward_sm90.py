"""The forward kernel between the outer stages of a learned long sequence: one short convolution for each row.

With the blocks F1 and V1 and the twiddle T of a row k0, F2 and V2 of all rows (`learned_three_pass` has the algebra), a
complex row Z and its share K of the taps' spectrum,

    C = (T * (F1 Z)) F2,      W = V1 (conj(T) * ((C * K) V2))

16 products of real 64 x 64 matrices a row, where fixed blocks take 8 and two that a radix of 4 has shrunk. A block of
threads loads the tables of its k0 once (`learned_rows`), 96 KB of its memory; the rest is for two spectra of the taps
and, for each of three warpgroups, a row and a result.
"""

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

    def of(self, k0) -> "Tables":
        """Those of one row, each `(planes, 64, 64)`."""
        return Tables(self.f1.at[k0], self.f2, self.f1_back.at[k0], self.f2_back, self.twiddle.at[k0])


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
        group, k0 = lax.axis_index("warpgroup"), schedule.k0
        barriers, shift_by = scratch["barriers"], shift[0]

        def fetch(step, zero):
            """Starts the copy of this warpgroup's row at a step."""
            feature, sequence, work = schedule.at(step, group)

            @pl.when(work)
            def _():
                for plane in (0, 1):
                    plgpu.copy_gmem_to_smem(
                        z.at[sequence, 0, feature, plane * m + k0],
                        scratch["z"].at[group + zero, plane],
                        barriers["rows"].at[group + zero],
                    )

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

        fetch(jnp.int32(0), 0)

        @pl.when(group == 0)
        def _():
            for name, table in Tables(*tables).of(k0)._asdict().items():
                for plane in range(_PLANES[name]):
                    plgpu.copy_gmem_to_smem(table.at[plane], scratch[name].at[plane], barriers["tables"])

        fetch_spectrum(jnp.int32(0))
        plgpu.barrier_wait(barriers["tables"])

        def convolve(visit, step, fresh):

            def block(name):
                zero = fresh()
                return [scratch[name].at[zero + plane] for plane in range(_PLANES[name])]

            def row(name):
                return complex_planes(scratch[name].at[group + fresh()], 0)

            # One slot of a row is read by products alone. A product is over, for all four warps, at the commit after
            # its wait; only then may the next copy write there.
            plgpu.barrier_wait(barriers["rows"].at[group + fresh()])
            a = _left(block("f1"), row("z"))
            plgpu.commit_smem()
            fetch(step + 1 + fresh(), fresh())
            c = _right(times(a, block("twiddle"), dtype), block("f2"))
            taps = complex_planes(scratch["spectrum"].at[lax.rem(visit, _SPECTRUM_SLOTS)], fresh())
            q = _right(times(c, taps, dtype), block("f2_back"))
            e = _times_conjugate(q, block("twiddle"), dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left its place
            for part, value in zip(row("w"), e, strict=True):
                part[...] = value
            plgpu.commit_smem()
            w = _left(block("f1_back"), row("w"))
            plgpu.commit_smem()  # all four warps have read what the result replaces
            for part, value in zip(row("w"), w, strict=True):
                part[...] = value.astype(dtype)
            plgpu.commit_smem()
            feature, sequence, _ = schedule.at(step + fresh(), group)
            for plane, part in enumerate(row("w")):
                plgpu.copy_smem_to_gmem(part, out.at[sequence, 0, feature, plane * m + k0])

        @pl.loop(0, schedule.visits)
        def _(visit):
            begin_item(visit)

            @pl.loop(0, schedule.rounds)
            def _(turn):
                step = visit * schedule.rounds + turn
                _, _, work = schedule.at(step, group)
                fresh = opaque_zeros(step, shift_by)  # lest both branches' addresses be kept through the longer one
                lax.cond(work, lambda: convolve(visit, step, fresh), lambda: fetch(step + 1 + fresh(), 0))

        plgpu.wait_smem_to_gmem(0)

    columns = {"twiddle": CHUNK}
    tables = {
        name: matrices((planes, N1, N1), dtype, columns=columns.get(name, TILE)) for name, planes in _PLANES.items()
    }
    scratch = {
        **tables,
        "spectrum": matrices((_SPECTRUM_SLOTS, 2, N1, TILE), dtype, columns=CHUNK),
        "z": matrices((WARPGROUPS, 2, N1, TILE), dtype),
        "w": matrices((WARPGROUPS, 2, N1, TILE), dtype),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=sum(_PLANES.values())),
            "rows": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            "spectrum": plgpu.Barrier(num_arrivals=2, num_barriers=_SPECTRUM_SLOTS),
            "done": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
    }
    return persistent_kernel(learned_rows_forward, shapes.sequences, scratch, schedule.grid, WARPGROUPS)
