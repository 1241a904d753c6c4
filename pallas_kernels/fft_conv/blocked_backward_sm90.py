"""The backward kernel for Hopper and sequences of two to four blocks of 4096 steps (`block_toeplitz`)."""

import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.block_toeplitz import (
    Schedule,
    Shapes,
    block_products,
    inverse,
    load_tables,
    put,
    put_columns,
)
from pallas_kernels.fft_conv.chain import ByColumns, apply_gate, floats
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, PIECE, load, matrices, persistent_kernel


def backward(shapes: Shapes):
    """The kernel (u, g, pre gate, post gate, spectrum, f1, f2, twiddle, [31]) -> (dx, ds).

    With x = pre u, h = post g and their spectra X and H,

        dx_j = Re F^-1(sum over m of conj(K_(m-j)) H_m),    ds_l = sum over rows and m of conj(X_(m-l)) H_m

    u is `(B, 1 or C, D, length, 64)`, g, the cotangent of the result, `(B, C, D, length, 64)`, as is dx, each channel's
    share; ds is `(parts, D, C, lags, 2, 64, 64)` in float32, to be summed over its parts. An absent gate is not read.

    For four lags ds is 128 KB, more than is left on chip. A block of the grid has a row's share of it added to the
    result in L2 by TMA while it works on, 16 columns of a lag at a time. They lie as they are stored, in pieces of 8
    columns, of which a warp fills 256 bytes at once; TMA adds them in rows of 128 bytes, each in one piece.

    The spectra X and H of a row fill shared memory. Those of the taps come from L2 for each row, to the place of X once
    it has been multiplied, if they fit there: `Shapes.dx_fits`. If not, the kernel is for ds alone, without the
    spectrum among its arguments.
    """
    schedule = Schedule(shapes)
    dtype, count, team_size, teams = shapes.dtype, shapes.count, shapes.team, shapes.teams
    lags = shapes.lag_range
    groups = team_size * teams
    has_gate = shapes.pre_gates > 0, shapes.post_gates > 0

    def body(u, g, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, dx, ds, scratch):
        shift_by = shift[0]
        group = lax.axis_index("warpgroup")
        team, member = (0, group) if teams == 1 else (group // team_size, lax.rem(group, team_size))
        barriers = scratch["barriers"]

        def with_block(work):
            return work if count == team_size else work & (member < count)

        def block_rows(zero):
            """Of the sequences. TMA reads zeros beyond them, and writes nothing there."""
            return pl.ds(pl.multiple_of((member + zero) * N1, N1), N1)

        def plane(which, part, zero):
            """Of the spectrum of this warpgroup's block of x (0) or h (1)."""
            return scratch["planes"].at[(which * groups + group + zero) * 2 + part]

        def arrived(which, part, zero):
            """The barrier of the sequence (0) or the gate (1) that is copied to that plane."""
            return barriers["arrived"].at[(which * 2 + part) * groups + group + zero]

        def fetch(which, step, zero):
            """Starts the copies of this warpgroup's block of u (0) or g (1), and of its gate, at a step."""
            item, row, work = schedule.at(step + zero, team)
            channel, feature = schedule.place(item)
            sources = (
                ((u, shapes.sequences), (pre_gate, shapes.pre_gates)),
                (
                    (g, shapes.channels),
                    (post_gate, shapes.post_gates),
                ),
            )

            @pl.when(with_block(work))
            def _():
                for part, (source, sequences) in enumerate(sources[which][: 1 + has_gate[which]]):
                    plgpu.copy_gmem_to_smem(
                        source.at[row, channel if sequences > 1 else 0, feature, block_rows(zero)],
                        plane(which, part, zero),
                        arrived(which, part, zero),
                    )

        fetch(0, jnp.int32(0), 0)

        @pl.when(group == 0)
        def _():
            load_tables(f1, f2, twiddle, scratch)

        plgpu.barrier_wait(barriers["tables"])

        def meet(which, zero):
            plgpu.barrier_arrive(barriers["all"].at[which + zero])
            plgpu.barrier_wait(barriers["all"].at[which + zero])

        @pl.loop(0, schedule.steps)
        def _(step):
            (item, *_row, work), any_work = schedule.at(step, team), schedule.at(step, 0)[-1]
            zeros = iter(range(1000))

            def fresh(turn=0):
                return lax.shift_right_logical(step + turn + next(zeros), shift_by)

            chain = ByColumns.over(scratch, fresh)

            def transform(which):
                plgpu.barrier_wait(arrived(which, 0, fresh(which)))
                x = plane(which, 0, fresh(which))

                def multiply(x=x):
                    plgpu.barrier_wait(arrived(which, 1, fresh(which)))
                    put_columns(x, apply_gate(x, plane(which, 1, fresh(which)), dtype))
                    plgpu.commit_smem()

                if any(has_gate):
                    pl.when(((which == 0) & has_gate[0]) | ((which == 1) & has_gate[1]))(multiply)
                chain = ByColumns.over(scratch, functools.partial(fresh, which))
                (a,) = chain.first([x])
                plgpu.commit_smem()  # the whole warpgroup has read x, which its spectrum replaces
                first = (which * groups + group) * 2
                put(chain.second([a]), lambda: scratch["planes"].at[pl.ds(first + fresh(which), 2)], dtype)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last dx has left its place

            @pl.when(with_block(work))
            def _():
                fetch(1, step, fresh())
                pl.loop(0, 2)(transform)

            def add_nothing():
                for which in (0, 1):
                    for part in (0, 1):
                        plane(which, part, fresh())[...] = jnp.zeros((N1, TILE), dtype)

            if teams > 1:  # a row that is not there
                pl.when(any_work & jnp.logical_not(work))(add_nothing)

            def own_columns(planes, zero):
                """This warpgroup's 16 columns of two planes."""
                columns = pl.ds(pl.multiple_of((group + zero) * CHUNK, CHUNK), CHUNK)
                return [planes.at[part, :, columns] for part in (0, 1)]

            def spectra(which, zero):
                """Those columns of every block of each team's row."""
                first = [[(which * groups + t * team_size + j) * 2 for j in range(count)] for t in range(teams)]
                return [[own_columns(scratch["planes"].at[pl.ds(i + zero, 2)], zero) for i in row] for row in first]

            def values(rows):
                return [[[load(part) for part in planes] for planes in row] for row in rows]

            def products():
                plgpu.commit_smem()
                meet(0, fresh())
                channel, feature = schedule.place(item)
                xs, hs = values(spectra(0, fresh())), values(spectra(1, fresh()))
                plgpu.commit_smem()  # something else takes the place of what has been read
                meet(1, fresh())
                if not shapes.dx_fits:
                    fetch(0, step + 1, fresh())
                else:

                    @pl.when(group == 0)
                    def _():
                        now = fresh()
                        for lag, part in itertools.product(range(len(lags)), (0, 1)):
                            plgpu.copy_gmem_to_smem(
                                spectrum.at[feature, channel, lag, part],
                                scratch["planes"].at[lag * 2 + part + fresh()],
                                barriers["taps"].at[now],
                            )

                begins = lax.rem(step, schedule.rounds) == 0
                place = lax.rem(item, schedule.splits) * schedule.spectra + feature * shapes.channels + channel
                plgpu.wait_smem_to_gmem(0)  # in order, or else the sums would depend on chance

                def add(lag):
                    sums = _block_correlations(xs, hs, lag)
                    zero = fresh()
                    share = scratch["sums"].at[group + zero]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for number, piece in enumerate(sums):
                        share.at[number][...] = piece
                    plgpu.commit_smem()
                    share = share.reshape(N1, 2 * CHUNK)
                    target = ds.at[place * len(lags) + lag - lags[0], group + zero]
                    pl.when(begins)(functools.partial(plgpu.copy_smem_to_gmem, share, target))
                    add = functools.partial(plgpu.copy_smem_to_gmem, share, target, reduction_op="add")
                    pl.when(jnp.logical_not(begins))(add)

                for lag in lags:
                    if shapes.dx_fits:
                        add(lag)
                    else:  # a branch that is always taken: without it the compiler keeps X and H, which this lag needs
                        # in float32, for the next lag, and spills 144 to 260 bytes
                        pl.when(fresh() == 0)(functools.partial(add, lag))

                if shapes.dx_fits:
                    plgpu.barrier_wait(barriers["taps"].at[fresh()])
                    zero = fresh()
                    for row in spectra(1, zero):
                        ks = [
                            own_columns(scratch["planes"].at[pl.ds(lag * 2 + zero, 2)], zero)
                            for lag in range(len(lags))
                        ]
                        (hs_of_row,), (ks,) = values([row]), values([ks])
                        products = block_products(hs_of_row, ks, shapes, adjoint=True)
                        for planes, product in zip(row, products, strict=True):
                            for part in (0, 1):
                                planes[part][...] = product[part]
                    plgpu.commit_smem()
                    meet(0, fresh())
                    fetch(0, step + 1, fresh())

            def transform_back():
                product = [plane(1, part, fresh()) for part in (0, 1)]
                mine = scratch["planes"].at[pl.ds((groups + group) * 2 + fresh(), 2)]
                result = inverse(chain, product, mine)
                plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
                zero = fresh()
                put_columns(plane(1, 1, zero), result.astype(dtype))
                plgpu.commit_smem()
                this, row, _ = schedule.at(step + zero, team)
                channel, feature = schedule.place(this)
                plgpu.copy_smem_to_gmem(plane(1, 1, zero), dx.at[row, channel, feature, block_rows(zero)])

            lax.cond(any_work, products, lambda: fetch(0, step + 1, fresh()))
            if shapes.dx_fits:
                pl.when(with_block(work))(transform_back)

        plgpu.wait_smem_to_gmem(0)

    def fft_conv_blocked_backward(u, g, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, dx, ds, scratch):
        body(u, g, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, dx, ds, scratch)

    def fft_conv_blocked_taps_gradient(u, g, pre_gate, post_gate, f1, f2, twiddle, shift, ds, scratch):
        body(u, g, pre_gate, post_gate, None, f1, f2, twiddle, shift, None, ds, scratch)

    scratch = {
        "f1": matrices((2, N1, N1), dtype, columns=CHUNK),
        "f2": matrices(column_dft.blocks_shape(TILE), dtype, columns=CHUNK),
        "twiddle": matrices((2, N1, TILE), dtype, columns=CHUNK),
        "planes": matrices((4 * groups, N1, TILE), dtype, columns=CHUNK),
        "sums": plgpu.SMEM((groups, 2 * CHUNK // PIECE, N1, PIECE), F32),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=5),
            "taps": plgpu.Barrier(num_arrivals=2 * len(lags), num_barriers=2),  # the second unused, as in `forward`
            "arrived": plgpu.Barrier(num_arrivals=1, num_barriers=(4 if any(has_gate) else 3) * groups),
            "all": plgpu.Barrier(num_arrivals=groups, num_barriers=2),
        },
    }
    dx = jax.ShapeDtypeStruct((shapes.batch, shapes.channels, shapes.features, shapes.length, TILE), dtype)
    ds = jax.ShapeDtypeStruct((schedule.splits * schedule.spectra * len(lags), groups, N1, 2 * CHUNK), F32)
    return persistent_kernel(
        fft_conv_blocked_backward if shapes.dx_fits else fft_conv_blocked_taps_gradient,
        (dx, ds) if shapes.dx_fits else (ds,),
        scratch,
        schedule.grid,
        groups,
    )


def whole_spectra(ds, shapes: Shapes):
    """What `backward` gives for the spectra, put together: each warpgroup's columns are by themselves there."""
    ds = ds.reshape(-1, *shapes.spectra, shapes.team * shapes.teams, 2, CHUNK // PIECE, N1, PIECE)
    return jnp.moveaxis(ds, (-5, -4, -3), (-3, -5, -2)).reshape(-1, *shapes.spectra, 2, N1, TILE)


def _block_correlations(xs, gs, lag: int):
    """Of conj(X_(m-lag)) G_m, summed over all rows and blocks in float32, re and then im in pieces of 8 columns."""
    parts: tuple[list, list] = ([], [])
    for at in range(0, CHUNK, PIECE):
        columns = slice(at, at + PIECE)
        re = im = None
        for x_row, g_row in zip(xs, gs, strict=True):
            for m in range(max(0, lag), min(len(g_row), len(g_row) + lag)):
                (a, b), (c, d) = (floats(*(plane[:, columns] for plane in z)) for z in (x_row[m - lag], g_row[m]))
                re = a * c + b * d if re is None else re + a * c + b * d
                im = a * d - b * c if im is None else im + a * d - b * c
        for part, total in zip(parts, (re, im), strict=True):
            part.append(total)
    return [*parts[0], *parts[1]]
