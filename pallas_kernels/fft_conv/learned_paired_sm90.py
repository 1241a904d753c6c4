"""The backward kernel with learned blocks of 64 x 64 points: all cotangents in one launch, by pairs of warpgroups.

The algebra and its names are those of `learned_backward_sm90`, whose launches for u and for g each transform both. Here
one warpgroup of a block has u and the other g, of the same row: each transforms its own, they exchange the spectra, and
each derives its own transform. So every row is read and transformed once, and no thread holds more sums than those of
one transform, 128 registers. Those of dK are in shared memory, and the warpgroup of g adds to them while that of u,
which has a product more, goes on.

In products of real 64 x 64 matrices, a row takes 2 + 4 for its spectrum, 4 for C N^H, 2 and 4 for dM and dN, and u 2
for its cotangent: 34 in all, where launches of their own took 50 and the fixed backward kernel takes 18.

Blocks are kept as real and imaginary part, 16 KB, not in real form with an adjoint beside it, 64 KB: products by an
imaginary part that counts as negative come after the other factor was negated in its place.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.chain import floats, opaque_zeros
from pallas_kernels.fft_conv.config import N1, TILE, Config
from pallas_kernels.fft_conv.learned_backward_sm90 import _by, _by_conjugate
from pallas_kernels.fft_conv.mosaic import (
    CHUNK,
    F32,
    add_products,
    by_columns,
    complex_planes,
    load,
    matrices,
    persistent_kernel,
    sums_of_products,
)
from pallas_kernels.fft_conv.tiles import Schedule, Shapes

_SIDES = 2
"""Warpgroups of a block: that of u and that of g."""

SHARED_MEMORY = 224 * 1024
"""Bytes of a block's matrices, all of 16-bit numbers but for dK."""

_SLOTS = 2
"""Of rows: one in work and one on its way."""

# One array of barriers, since the phases of each take a register all the while: of every place for a row, of each plane
# of the spectrum, and two of each warpgroup, at which the other one arrives, in turns: it may do so again before this
# one has looked, which would miss an arrival if it were at the same barrier.
_SPECTRUM = _SLOTS * _SIDES
_MET = _SPECTRUM + 2


@dataclasses.dataclass(frozen=True)
class _PairSchedule(Schedule):
    """One row at a time for all of a block."""

    def at(self, step):
        """(item, row of the batch, whether there is any work)."""
        item = lax.axis_index("block") + (step // self.rounds) * self.grid
        tile = lax.rem(step, self.rounds)
        row = lax.rem(item, self.splits) * self.tiles + tile
        return item, row, (step < self.steps) & (item < self.items) & (row < self.batch)


def _weighed(dtype, sign, a, b, c, d):
    """(a + ib) times conj(c + id) where the sign is 1, times c + id where it is -1."""
    a, b, c, d = floats(a, b, c, d * sign)
    return (a * c + b * d).astype(dtype), (b * c - a * d).astype(dtype)


def _correlated(zero, a, b, c, d, re, im):
    """(re, im) + conj(a + ib) (c + id)."""
    # With a zero, lest the compiler make float32 numbers of a and b once, for this and for C, and spill 64 in between.
    a, b, c, d = floats(a + zero, b + zero, c, d)
    return re + a * c + b * d, im + a * d - b * c


def backward(shapes: Shapes, blocks: int = 132):
    """The kernel (u, g, spectrum, [31], M, N, twiddle) -> (du, dM, dN, dK), of the two transforms, u's first.

    u, g and du are `(B, D, length, 64)`, the spectrum of the taps `(D, re | im, 64, 64)`, M and N
    `(transform, re | im, 64, 64)` and the twiddle `(re | im, 64, 64)`, all of one dtype. The rest are partial sums in
    float32: dM and dN `(parts, transform, re | im, 64, 64)`, dK `(parts, D, re | im, 64, 64)`.
    """
    dtype = shapes.dtype
    schedule = _PairSchedule(Config(TILE, 1, 1, blocks), shapes.batch, shapes.features)
    sums = jax.ShapeDtypeStruct((schedule.grid, _SIDES, 2, N1, TILE), F32)
    results = (
        jax.ShapeDtypeStruct((shapes.batch, shapes.features, shapes.length, TILE), dtype),
        sums,
        sums,
        jax.ShapeDtypeStruct((schedule.splits, shapes.features, 2, N1, TILE), F32),
    )

    def learned_fft_conv_backward(u, g, spectrum, shift, first, second, twiddle, du, d_first, d_second, dk, scratch):
        side = lax.axis_index("warpgroup")
        barriers = scratch["barriers"]
        shift_by = shift[0]
        of_u = side == 0

        def place(step):
            """Of this warpgroup's row at a step."""
            return lax.rem(step, _SLOTS) * _SIDES + side

        def arrived(number):
            return barriers["arrived"].at[number]

        def fetch(step):
            """Starts the copy of this warpgroup's row at a step."""
            item, row, work = schedule.at(step)
            for source, mine in ((u, of_u), (g, jnp.logical_not(of_u))):

                @pl.when(work & mine)
                def _(source=source):
                    target = scratch["rows"].at[place(step), pl.ds(0, shapes.length)]
                    plgpu.copy_gmem_to_smem(source.at[row, item // schedule.splits], target, arrived(place(step)))

        def item(visit):
            return lax.axis_index("block") + visit * schedule.grid

        def fetch_spectrum(visit):
            @pl.when(of_u)
            def _():
                for plane in (0, 1):
                    source = spectrum.at[item(visit) // schedule.splits, plane]
                    plgpu.copy_gmem_to_smem(source, scratch["spectrum"].at[plane], arrived(_SPECTRUM + plane))

        def tell(turn, zero):
            plgpu.barrier_arrive(arrived(_MET + turn * _SIDES + 1 - side + zero))

        def hear(turn, zero):
            plgpu.barrier_wait(arrived(_MET + turn * _SIDES + side + zero))

        if shapes.length < N1:  # TMA never writes the rest
            for slot in range(_SLOTS):
                scratch["rows"][slot * _SIDES + side] = jnp.zeros((N1, TILE), dtype)
            plgpu.commit_smem()
        for ahead in range(_SLOTS):
            fetch(jnp.int32(ahead))

        @pl.when(of_u)
        def _():
            for plane in (0, 1):
                plgpu.copy_gmem_to_smem(twiddle.at[plane], scratch["twiddle"].at[plane], barriers["tables"])
                for name, table in (("first", first), ("second", second)):
                    for number in range(_SIDES):
                        target = scratch[name].at[number, plane]
                        plgpu.copy_gmem_to_smem(table.at[number, plane], target, barriers["tables"])

        plgpu.barrier_wait(barriers["tables"])

        def tile(step, zero, totals):
            d_m, d_n = totals

            def planes(name, of=side):
                return complex_planes(scratch[name].at[of + zero()], 0)

            def row():
                return scratch["rows"].at[place(step + zero())]

            def turned(function, z):
                """Times the twiddle, in a way."""
                pieces = complex_planes(scratch["twiddle"], zero())
                return by_columns(lambda *parts: function(dtype, *parts), *z, *pieces)

            def save(name, z):
                for part, value in zip(planes(name), z, strict=True):
                    part[...] = value

            plgpu.barrier_wait(arrived(place(step + zero())))
            b = turned(_by, sums_of_products(*([(part, row())] for part in planes("first"))))
            save("held", b)
            plgpu.commit_smem()
            (b_re, b_im), (n_re, n_im) = planes("held"), planes("second")
            sums = sums_of_products([(b_re, n_re), (-b[1], n_im)], [(b_re, n_im), (b_im, n_re)])
            own = tuple(part.astype(dtype) for part in sums)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last du has left this place
            save("spectra", own)
            now = zero()
            tell(0, now)
            hear(0, now)
            other = [load(part) for part in planes("spectra", 1 - side)]
            tell(1, now)

            @pl.when(jnp.logical_not(of_u))
            def _():
                sums = complex_planes(scratch["dk"], zero())
                correlated = functools.partial(_correlated, zero().astype(dtype))
                for part, value in zip(sums, by_columns(correlated, *other, *own, *sums), strict=True):
                    part[...] = value

            taps = complex_planes(scratch["spectrum"], zero())
            sign = jnp.where(of_u, 1.0, -1.0).astype(dtype)
            c = by_columns(functools.partial(_weighed, dtype, sign), *other, *taps)
            hear(1, zero())  # the other warpgroup has read what C replaces
            save("spectra", c)
            plgpu.commit_smem()

            (b_re, b_im), (c_re, c_im) = planes("held"), planes("spectra")
            n_re, n_im = (part.T for part in planes("second"))
            sums = [(c_re, n_re), (c_im, n_im)], [(b_re.T, c_re), (b_im.T, c_im)]
            e_re, d_n_re = add_products((zeros(), d_n[0]), *sums)
            plgpu.commit_smem()  # the whole warpgroup has read C
            c_re[...] = -load(c_re)
            plgpu.commit_smem()
            (b_re, b_im), (c_re, c_im) = planes("held"), planes("spectra")
            n_re, n_im = (part.T for part in planes("second"))
            sums = [(c_im, n_re), (c_re, n_im)], [(b_re.T, c_im), (b_im.T, c_re)]
            e_im, d_n_im = add_products((zeros(), d_n[1]), *sums)
            a = turned(_by_conjugate, (e_re, e_im))
            d_m = add_products(d_m, *([(part, row().T)] for part in a))
            plgpu.commit_smem()  # the whole warpgroup has read its row, B and C
            fetch(step + _SLOTS + zero())

            @pl.when(of_u)
            def _():
                save("held", a)
                plgpu.commit_smem()
                pairs = zip(planes("first"), planes("held"), strict=True)
                (ds,) = sums_of_products([(m.T, part) for m, part in pairs])
                result = planes("spectra")[0]
                result[...] = ds.astype(dtype)
                plgpu.commit_smem()
                this, row_of_batch, _ = schedule.at(step + zero())
                source = result.at[pl.ds(0, shapes.length)]
                plgpu.copy_smem_to_gmem(source, du.at[row_of_batch, this // schedule.splits])

            return tuple(d_m), (d_n_re, d_n_im)

        def zeros():
            return plgpu.layout_cast(jnp.zeros((N1, TILE), F32), plgpu.Layout.WGMMA)

        def turn(step, totals):
            zero = opaque_zeros(step, shift_by)

            @pl.when((lax.rem(step, schedule.rounds) == 0) & (item(step // schedule.rounds + zero()) < schedule.items))
            def _():
                for turn in (0, 1):  # both are past the last item, so that its spectrum may go
                    tell(turn, zero())
                    hear(turn, zero())
                fetch_spectrum(step // schedule.rounds + zero())

                @pl.when(jnp.logical_not(of_u))
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last dK has left
                    for plane in (0, 1):
                        scratch["dk"][plane + zero()] = zeros()

                for plane in (0, 1):
                    plgpu.barrier_wait(arrived(_SPECTRUM + plane))

            def rest(totals):
                fetch(step + _SLOTS + zero())
                return totals

            work = schedule.at(step)[-1]
            totals = lax.cond(work, lambda totals: tile(step, zero, totals), rest, totals)
            this = item(step // schedule.rounds + zero())
            ends = (lax.rem(step, schedule.rounds) == schedule.rounds - 1) & (this < schedule.items)

            @pl.when(ends & jnp.logical_not(of_u))
            def _():
                plgpu.commit_smem()
                for plane in (0, 1):
                    target = dk.at[lax.rem(this, schedule.splits), this // schedule.splits, plane]
                    plgpu.copy_smem_to_gmem(scratch["dk"].at[plane], target)

            return totals

        totals = lax.fori_loop(0, schedule.steps, turn, ((zeros(),) * 2, (zeros(),) * 2))
        for out, sums in zip((d_first, d_second), totals, strict=True):
            for plane, total in enumerate(sums):
                out[lax.axis_index("block"), side, plane] = total
        plgpu.wait_smem_to_gmem(0)

    pairs = matrices((_SIDES, 2, N1, TILE), dtype)
    scratch = {
        "first": pairs,
        "second": pairs,
        "twiddle": matrices((2, N1, TILE), dtype, columns=CHUNK),
        "rows": matrices((_SLOTS * _SIDES, N1, TILE), dtype),
        "held": pairs,
        "spectra": pairs,
        "spectrum": matrices((2, N1, TILE), dtype, columns=CHUNK),
        "dk": matrices((2, N1, TILE), F32, columns=CHUNK),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=2 + 4 * _SIDES),
            "arrived": plgpu.Barrier(num_arrivals=1, num_barriers=_MET + 2 * _SIDES),
        },
    }
    return persistent_kernel(learned_fft_conv_backward, results, scratch, schedule.grid, _SIDES)
