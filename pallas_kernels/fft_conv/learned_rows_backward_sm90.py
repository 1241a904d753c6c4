"""The backward kernel between the outer stages of a learned long sequence: all cotangents, by pairs of warpgroups.

It is `learned_paired_sm90` for rows that are complex and have tables of their own (`learned_rows`). Of each row one
warpgroup has that of the sequence, Z, and the other that of the cotangent of its result, H. In the names of
`learned_backward_sm90`, with (M, N) = (F1, F2) for s = Z and (V1^H, V2^H) for s = H,

    B = T * M s,      S = B N,      C = conj(K) * O  or  K * O, of the other one's spectrum O,      dN = sum B^H C
    A = conj(T) * (C N^H),      dM = sum A s^H,      ds = M^H A,      dK = sum conj(S of Z) * (S of H)

where ds of Z is its cotangent, and that of H what the forward pass gave before it was joined. Each warpgroup sums up
one part of dK, in shared memory.

Each of the six complex products is 4 of real 64 x 64 matrices, in all 24 for each of the two. At 128 cycles each that
is 6144 for a pair of rows. Seven left factors of the 24 are in registers; to read the other operands from shared
memory takes 5248 at 128 bytes a cycle.

No product can be subtracted: a factor is negated in registers before it, or the sum is. The imaginary part of dN would
be negated twice for each row, before Im B^T Re C and after it, as both are in shared memory. It is once, since the sum
has the other sign after each step, and the two products the other order.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.chain import floats, opaque_zeros
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.learned_backward_sm90 import _by, _by_conjugate
from pallas_kernels.fft_conv.learned_rows import Schedule, Shapes
from pallas_kernels.fft_conv.mosaic import (
    CHUNK,
    F32,
    PIECE,
    add_products,
    by_columns,
    complex_planes,
    load,
    matrices,
    persistent_kernel,
    sums_of_products,
)

_SIDES = 2
"""Warpgroups of a block: that of Z and that of H."""

SHARED_MEMORY = 224 * 1024
"""Bytes of a block's matrices, all of 16-bit numbers but for dK."""

# A warpgroup has three places for complex matrices: that of its row; of B, then A, then the result; and of S, then C.
# The next row comes to the last of these as soon as C has been read, long before the products with this row end. So in
# the next step each is two places further: B comes to where the last row was, and S to where the last result was, once
# it has left.
_PLACES = 3
_ROW, _HELD, _SPECTRA = range(_PLACES)

# One array of barriers, since the phases of each take a register all the while: of each plane of the row on its way to
# each warpgroup, of each plane of the spectrum, and two of each warpgroup, at which the other one arrives, in turns: it
# may do so again before this one has looked, which would miss an arrival if it were at the same barrier.
_SPECTRUM = 2 * _SIDES
_MET = _SPECTRUM + 2


def _weighed(dtype, sign, a, b, c, d):
    """(a + ib) times conj(c + id) where the sign is 1, times c + id where it is -1."""
    a, b, c, d = floats(a, b, c, d * sign)
    return (a * c + b * d).astype(dtype), (b * c - a * d).astype(dtype)


def _add_weighed(zero, sign, a, b, c, d, total):
    """The total and a c + sign b d."""
    # Not a and b themselves: the compiler would make float32 numbers of them once, for this and for C, and spill some.
    a, b, c, d = floats(a + zero, b * sign, c, d)
    return (total + a * c + b * d,)


def _add_products_during(work, totals, *sums):
    """As `add_products`, and what the work returns, which is done while the products are on their way."""

    def run(*accumulators):
        for accumulator, total in zip(accumulators, totals, strict=True):
            accumulator[...] = total
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        done = work()
        return [accumulator[...] for accumulator in accumulators], done

    return pl.run_scoped(run, *(plgpu.ACC(total.shape, F32) for total in totals))


def _negative(total):
    """Of a sum of products that another is to be added to."""
    # Behind a barrier, for the compiler would do it before the products are there, and then wait for each.
    return -lax.optimization_barrier(total)


def backward(shapes: Shapes):
    """The kernel (z, h, spectrum, [31], M, N, twiddle) -> (dz, w, dM, dN, dK), of the two transforms, z's first.

    z, h, dz and w are `(B, 1, D, re | im m, 64, 64)`, the spectrum of the taps `(D, m, re | im, 64, 64)`, M
    `(transform, m, re | im, 64, 64)`, N `(transform, re | im, 64, 64)` and the twiddle `(m, re | im, 64, 64)`, all of
    one dtype. The rest are partial sums in float32: dM and dN `(parts, m, transform, re | im, 64, 64)`, dK
    `(parts, D, m, re | im, 64, 64)`.
    """
    dtype = shapes.dtype
    schedule = Schedule(shapes, workers=1)
    sums = jax.ShapeDtypeStruct((schedule.shares, shapes.rows, _SIDES, 2, N1, TILE), F32)
    results = (
        *[shapes.sequences] * _SIDES,
        *[sums] * 2,
        jax.ShapeDtypeStruct((schedule.splits, shapes.features, shapes.rows, 2, N1, TILE), F32),
    )

    def learned_rows_backward(z, h, spectrum, shift, first, second, twiddle, dz, w, d_first, d_second, dk, scratch):
        side = lax.axis_index("warpgroup")
        shift_by = shift[0]
        of_z = side == 0

        def by_side(function):
            """Runs function(source, result) on those of this side."""
            for mine, pair in ((of_z, (z, dz)), (jnp.logical_not(of_z), (h, w))):
                pl.when(mine)(functools.partial(function, *pair))

        def k0(zero):
            """Of this block, found again for a zero of its own, so that no register keeps it."""
            return lax.rem(lax.axis_index("block") + zero, shapes.rows)

        def place(step, what):
            return scratch["places"].at[side, lax.rem(2 * step + what, _PLACES)]

        def arrived(number):
            return scratch["barriers"]["arrived"].at[number]

        def fetch(step, zero=0):
            """Starts the copy of this warpgroup's row at a step."""
            feature, sequence, work = schedule.at(step, 0)

            @pl.when(work)
            def _():
                def copy(source, result):
                    for plane in (0, 1):
                        row = source.at[sequence, 0, feature, plane * shapes.rows + k0(zero)]
                        plgpu.copy_gmem_to_smem(row, place(step, _ROW).at[plane], arrived(2 * side + plane))

                by_side(copy)

        def fetch_spectrum(visit, zero):
            feature = schedule.place(schedule.item(visit))[0]

            @pl.when(of_z)
            def _():
                for plane in (0, 1):
                    source = spectrum.at[feature, k0(zero), plane]
                    plgpu.copy_gmem_to_smem(source, scratch["spectrum"].at[plane], arrived(_SPECTRUM + plane))

        def tell(turn, zero=0):
            plgpu.barrier_arrive(arrived(_MET + turn * _SIDES + 1 - side + zero))

        def hear(turn, zero=0):
            plgpu.barrier_wait(arrived(_MET + turn * _SIDES + side + zero))

        fetch(jnp.int32(0))

        @pl.when(of_z)
        def _():
            for plane in (0, 1):
                tables = [(twiddle.at[schedule.k0, plane], scratch["twiddle"].at[plane])]
                for number in range(_SIDES):
                    tables.append((first.at[number, schedule.k0, plane], scratch["first"].at[number, plane]))
                    tables.append((second.at[number, plane], scratch["second"].at[number, plane]))
                for source, target in tables:
                    plgpu.copy_gmem_to_smem(source, target, scratch["barriers"]["tables"])

        plgpu.barrier_wait(scratch["barriers"]["tables"])

        def begin(step, zero):
            """Awaits an item's spectrum and zeroes its dK, once that of the last item has left."""

            @pl.when(begins(step, zero))
            def _():
                scratch["dk"][side + zero] = zeros()
                for plane in (0, 1):
                    plgpu.barrier_wait(arrived(_SPECTRUM + plane))

        def tile(step, zero, totals):
            d_m, (d_n_re, d_n_im) = totals

            def table(name):
                return complex_planes(scratch[name].at[side + zero()], 0)

            def planes(what):
                return complex_planes(place(step + zero(), what), 0)

            def turned(function, x):
                """Times the twiddle, in a way."""
                pieces = complex_planes(scratch["twiddle"], zero())
                return by_columns(functools.partial(function, dtype), *x, *pieces)

            def save(what, x):
                for part, value in zip(planes(what), x, strict=True):
                    part[...] = value

            for plane in (0, 1):
                plgpu.barrier_wait(arrived(2 * side + plane))
            (m_re, m_im), (re, im) = table("first"), planes(_ROW)
            b = turned(_by, sums_of_products([(m_re, re), (-load(m_im), im)], [(m_re, im), (m_im, re)]))
            save(_HELD, b)  # where the last row was, which all of the warpgroup had read when it saved its result
            plgpu.commit_smem()
            (b_re, b_im), (n_re, n_im) = planes(_HELD), table("second")
            sums = sums_of_products([(b_re, n_re), (-b[1], n_im)], [(b_re, n_im), (b_im, n_re)])
            own = tuple(part.astype(dtype) for part in sums)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left this place
            save(_SPECTRA, own)
            tell(0, zero())
            hear(0, zero())
            theirs = complex_planes(scratch["places"].at[1 - side, lax.rem(2 * (step + zero()) + _SPECTRA, _PLACES)], 0)
            other = [load(part) for part in theirs]
            tell(1, zero())

            begin(step + zero(), zero())
            sign = jnp.where(side + zero() == 0, 1.0, -1.0).astype(dtype)
            mine, total = place(step + zero(), _SPECTRA), scratch["dk"].at[side + zero()]
            pair = load(mine.at[side]), load(mine.at[1 - side])
            weigh = functools.partial(_add_weighed, zero().astype(dtype), sign)
            (total[...],) = by_columns(weigh, *other, *pair, total)

            taps = complex_planes(scratch["spectrum"], zero())
            c = by_columns(functools.partial(_weighed, dtype, sign), *other, *taps)
            hear(1, zero())  # the other warpgroup has read what C replaces
            save(_SPECTRA, c)
            plgpu.commit_smem()  # C, and B

            (c_re, c_im), (n_re, n_im) = planes(_SPECTRA), (part.T for part in table("second"))
            e = sums_of_products([(c_re, n_re), (c_im, n_im)], [(c_im, n_re), (-c[0], n_im)])

            def half_of_a(number):
                columns = slice(number * N1 // 2, (number + 1) * N1 // 2)
                pieces = (part.at[:, columns] for part in complex_planes(scratch["twiddle"], zero()))
                weigh = functools.partial(_by_conjugate, dtype)
                return by_columns(weigh, *(part[:, columns] for part in e), *pieces)

            def d_n_im_product(number):
                """Of Re B and Im C or of Im B and Re C, which goes first at every second step."""
                which = lax.rem(step + number + zero(), 2)
                return place(step + zero(), _HELD).at[which].T, place(step + zero(), _SPECTRA).at[1 - which]

            (b_re, b_im), (c_re, c_im) = planes(_HELD), planes(_SPECTRA)
            sums = [(b_re.T, c_re), (b_im.T, c_im)], [d_n_im_product(0)]
            (d_n_re, d_n_im), left = _add_products_during(lambda: half_of_a(0), (d_n_re, d_n_im), *sums)
            d_n_im = _negative(d_n_im)
            (d_n_im,), right = _add_products_during(lambda: half_of_a(1), (d_n_im,), [d_n_im_product(1)])
            a = tuple(lax.concatenate(halves, 1) for halves in zip(left, right, strict=True))
            plgpu.commit_smem()  # the whole warpgroup has read B and C
            fetch(step + 1 + zero(), zero())

            re, im = (part.T for part in planes(_ROW))
            sums = [(a[0], re), (a[1], im)], [(a[1], re), (-a[0], im)]
            d_m, _ = _add_products_during(lambda: save(_HELD, a), d_m, *sums)  # which read the row alone
            plgpu.commit_smem()
            (m_re, m_im), (a_re, a_im) = (part.T for part in table("first")), planes(_HELD)
            out_re, out_im = sums_of_products([(m_re, a_re), (m_im, a_im)], [(m_im, a_re)])
            m_re, a_im = table("first")[0].T, planes(_HELD)[1]
            (out_im,) = add_products((_negative(out_im),), [(m_re, a_im)])
            plgpu.commit_smem()  # the whole warpgroup has read its row and A
            save(_HELD, (out.astype(dtype) for out in (out_re, out_im)))
            plgpu.commit_smem()

            def copy(source, result):
                feature, sequence, _ = schedule.at(step + zero(), 0)
                for plane, part in enumerate(planes(_HELD)):
                    row = result.at[sequence, 0, feature, plane * shapes.rows + k0(zero())]
                    plgpu.copy_smem_to_gmem(part, row)

            by_side(copy)
            return tuple(d_m), (d_n_re, d_n_im)

        def zeros():
            return plgpu.layout_cast(jnp.zeros((N1, TILE), F32), plgpu.Layout.WGMMA)

        def begins(step, zero):
            """Whether a step is the first one of an item."""
            return (lax.rem(step, schedule.rounds) == 0) & (
                schedule.item(step // schedule.rounds + zero) < schedule.items
            )

        def turn(step, totals):
            zero = opaque_zeros(step, shift_by)

            @pl.when(begins(step, zero()))
            def _():
                for turn in (0, 1):  # both are past the last item, so that its spectrum may go
                    tell(turn, zero())
                    hear(turn, zero())
                fetch_spectrum(step // schedule.rounds + zero(), zero())

            def rest(totals):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last result has left the next row's place
                begin(step, zero())
                fetch(step + 1 + zero(), zero())
                d_m, (d_n_re, d_n_im) = totals
                return d_m, (d_n_re, -d_n_im)

            work = schedule.at(step, 0)[-1]
            totals = lax.cond(work, lambda totals: tile(step, zero, totals), rest, totals)
            item = schedule.item(step // schedule.rounds + zero())

            @pl.when((lax.rem(step, schedule.rounds) == schedule.rounds - 1) & (item < schedule.items))
            def _():
                plgpu.commit_smem()
                feature, share = schedule.place(item)
                plgpu.copy_smem_to_gmem(scratch["dk"].at[side], dk.at[share, feature, k0(zero()), side])

            return totals

        d_m, (d_n_re, d_n_im) = lax.fori_loop(0, schedule.steps, turn, ((zeros(),) * 2, (zeros(),) * 2))
        d_n = d_n_re, (-1) ** schedule.steps * d_n_im
        for out, sums in ((d_first, d_m), (d_second, d_n)):
            for plane, total in enumerate(sums):
                out[schedule.share, schedule.k0, side, plane] = total
        plgpu.wait_smem_to_gmem(0)

    blocks = matrices((_SIDES, 2, N1, TILE), dtype)
    elementwise = matrices((2, N1, TILE), dtype, columns=CHUNK)
    scratch = {
        "first": blocks,
        "second": blocks,
        "twiddle": elementwise,
        "places": matrices((_SIDES, _PLACES, 2, N1, TILE), dtype),
        "spectrum": elementwise,
        # In tiles of more columns a warp's rows meet in a bank, and to avoid it takes 64 of 3600 instructions.
        "dk": matrices((2, N1, TILE), F32, columns=PIECE),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=2 + 4 * _SIDES),
            "arrived": plgpu.Barrier(num_arrivals=1, num_barriers=_MET + 2 * _SIDES),
        },
    }
    return persistent_kernel(learned_rows_backward, results, scratch, schedule.grid, _SIDES)
