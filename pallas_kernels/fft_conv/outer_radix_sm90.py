"""Kernels for Hopper: the outer stages of sequences of more than 256 rows of 4096 steps, by two factors in one pass.

With m = r h rows a product by the whole matrix would take 2 m / 3 FLOP a byte, of which there is time for 184. Instead
the sums over r rows are done in registers and a product by h x h follows, or precedes them on the way back
(`outer_plan`). With r = 4 q they are cut once more: with a = q a1 + a0 and ka = k0 + 4 k1,

    sum over a of exp(-2 pi i (ka + 1/4) a / r) u[a]
        = sum over a0 of exp(-2 pi i k1 a0 / q) (sum over a1 of exp(-2 pi i (k0 + 1/4) a / r) u[a])

where q is 2 or 4, so that the outer sums take additions alone, and two sums of four terms do for one of sixteen.

The four warpgroups of a block share a panel of some columns of all rows. Of the split each has a k0 and goes on to the
next panel when it likes. Of the join it takes the ka of a k0 first and, once all have met, 16 or 32 columns of a share
of all sums, so that a panel is read once or a few times and not by all. F is an operand in registers, read once for all
products of a panel.
"""

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.column_dft import radix_sums
from pallas_kernels.fft_conv.config import BLOCK, N1
from pallas_kernels.fft_conv.mosaic import F32, by_columns, load, matrices, sums_of_products
from pallas_kernels.fft_conv.outer_panels import GROUPS, Panels, Shapes, along_rows, load_tables, row_vector
from pallas_kernels.fft_conv.widening import widened


def _zeros(count: int, columns: int):
    nothing = plgpu.layout_cast(jnp.zeros((N1, columns), F32), plgpu.Layout.WGMMA)
    return (nothing,) * count


def split(shapes: Shapes):
    """The kernel (u, F, f, roots) -> Z, `(sequences, *Panels.z)`.

    u is `(sequences, rows, 4096)`; F, f and the roots are `outer_plan.radix_tables` and `radix_roots`.
    """
    plan, dtype = shapes.plan, shapes.dtype
    radix, height, slots, quarter = plan.radix, plan.height, shapes.slots, shapes.quarter
    columns, tile = shapes.columns, shapes.tile
    panels = Panels(shapes)

    def fft_conv_outer_radix_split(u, f, factors, roots, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers = scratch["barriers"]

        def fetch(step):
            sequence, column, work = panels.at(step)
            where = pl.ds(pl.multiple_of(column, columns), columns)
            slot = lax.rem(step, slots)

            @pl.when(work & (group == 0))
            def _():
                for a in range(radix):  # 64 rows: F is zero beyond h of them
                    rows = pl.ds(pl.multiple_of(a * height + 0 * step, 16), N1)
                    target = scratch["panel"].at[slot, a]
                    plgpu.copy_gmem_to_smem(u.at[sequence, rows, where], target, barriers["panel"].at[slot])

        for ahead in range(slots):
            fetch(jnp.int32(ahead))
        load_tables(group, f, factors, scratch, barriers["tables"])

        @pl.loop(0, panels.steps)
        def _(step):
            _sequence, _column, work = panels.at(step)
            slot = lax.rem(step, slots)

            @pl.when(work)
            def _():
                plgpu.barrier_wait(barriers["panel"].at[slot])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left their places

                @pl.loop(0, columns // tile)
                def _(piece):
                    mine = pl.ds(pl.multiple_of(piece * tile, tile), tile)

                    def add(a1, sums):
                        """Those of each a0."""
                        results = []
                        for a0 in range(quarter):
                            a = quarter * a1 + a0
                            c, d = roots[group, 0, a], roots[group, 1, a]

                            def more(x, re, im, c=c, d=d):
                                x = widened(x)
                                return re + c * x, im + d * x

                            pair = sums[2 * a0 : 2 * a0 + 2]
                            results += by_columns(more, load(scratch["panel"].at[slot, a, :, mine]), *pair)
                        return tuple(results)

                    # A loop, lest the compiler load every tile before it adds the first.
                    sums = lax.fori_loop(0, GROUPS, add, _zeros(2 * quarter, tile))

                    def turned(*sums):
                        """Those of each k1 times f."""
                        results = []
                        for k1, (c, d) in enumerate(radix_sums(list(zip(sums[::2], sums[1::2], strict=True)))):
                            factor = (
                                row_vector(scratch["factors"].at[k1 * GROUPS + lax.axis_index("warpgroup"), part])
                                for part in (0, 1)
                            )
                            a, b = (along_rows(part, c.shape[1]) for part in factor)
                            results += [(a * c - b * d).astype(dtype), (a * d + b * c).astype(dtype)]
                        return tuple(results)

                    for number, value in enumerate(by_columns(turned, *sums)):
                        scratch["v"].at[group, number // 2, number % 2, :, mine][...] = value

                plgpu.commit_smem()
                plgpu.barrier_arrive(barriers["done"].at[slot])  # this warpgroup has read the panel

                @pl.when(group == 0)
                def _():
                    plgpu.barrier_wait(barriers["done"].at[slot])  # and so have the others

                fetch(step + slots)

                f_re, f_im, minus_im = (load(scratch["f"].at[plane]) for plane in range(3))

                @pl.loop(0, quarter)
                def _(k1):
                    place = [scratch["v"].at[group, k1, part] for part in (0, 1)]
                    z = sums_of_products([(f_re, place[0]), (minus_im, place[1])], [(f_re, place[1]), (f_im, place[0])])
                    plgpu.commit_smem()  # the whole warpgroup has read what the result replaces
                    for part, value in enumerate(z):
                        place[part][...] = value.astype(dtype)
                    plgpu.commit_smem()
                    for part in (0, 1):
                        target = panels.rows_of_z(out, step, part, (k1 * GROUPS + group) * height, height)
                        plgpu.copy_smem_to_gmem(place[part].at[pl.ds(0, height)], target)

        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "f": matrices((3, N1, N1), dtype, columns=tile),
        "factors": plgpu.SMEM((radix, 2, N1), F32),
        "panel": matrices((slots, radix, N1, columns), dtype, columns=tile),
        "v": matrices((GROUPS, quarter, 2, N1, columns), dtype, columns=tile),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=4),
            "panel": plgpu.Barrier(num_arrivals=radix, num_barriers=slots),
            "done": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=slots),
        },
    }
    return panels.launch(fft_conv_outer_radix_split, scratch, *panels.z)


def join(shapes: Shapes):
    """The kernel (w, F, f, roots) -> y, `(sequences, rows, 4096)`; w is like the result of `split`, the tables its."""
    plan, dtype = shapes.plan, shapes.dtype
    radix, height, slots, quarter = plan.radix, plan.height, shapes.slots, shapes.quarter
    columns, tile = shapes.columns, shapes.tile
    panels = Panels(shapes)
    pieces = columns // tile
    shares = GROUPS // pieces  # warpgroups with the same columns
    count = min(GROUPS, radix // shares)  # results of an a0 that one of them makes

    def fft_conv_outer_radix_join(w, f, factors, roots, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers = scratch["barriers"]

        def fetch(step):
            _sequence, _column, work = panels.at(step)
            slot = lax.rem(step, slots)

            @pl.when(work & (group == 0))
            def _():
                for part in (0, 1):
                    for ka in range(radix):  # 64 rows: F is zero beyond h of them
                        source = panels.rows_of_z(w, step, part, ka * height, N1)
                        plgpu.copy_gmem_to_smem(source, scratch["panel"].at[slot, ka, part], barriers["panel"].at[slot])

        def meet():
            plgpu.barrier_arrive(barriers["met"])
            plgpu.barrier_wait(barriers["met"])

        def sum_over_k1(slot, piece):
            """In place, of some columns of what this warpgroup has made: for each a0 the sum in its place."""
            mine = pl.ds(pl.multiple_of(piece * tile, tile), tile)
            places = [
                scratch["panel"].at[slot, k1 * GROUPS + group, part, :, mine]
                for k1 in range(quarter)
                for part in (0, 1)
            ]

            def summed(*e):
                parts = [widened(part) for part in e]
                # Conjugate roots: those of the split for the parts exchanged.
                sums = radix_sums(list(zip(parts[1::2], parts[::2], strict=True)))
                return tuple(part.astype(dtype) for im, re in sums for part in (re, im))

            for place, value in zip(places, by_columns(summed, *map(load, places)), strict=True):
                place[...] = value

        for ahead in range(slots):
            fetch(jnp.int32(ahead))
        load_tables(group, f, factors, scratch, barriers["tables"])

        @pl.loop(0, panels.steps)
        def _(step):
            sequence, column, work = panels.at(step)
            where = pl.ds(pl.multiple_of(column, columns), columns)
            slot = lax.rem(step, slots)

            @pl.when(work)
            def _():
                plgpu.barrier_wait(barriers["panel"].at[slot])

                f_re, f_im, minus_im = (load(scratch["f"].at[plane]) for plane in range(3))

                @pl.loop(0, quarter)
                def _(turn):
                    ka = turn * GROUPS + group
                    place = [scratch["panel"].at[slot, ka, part] for part in (0, 1)]
                    g = sums_of_products([(f_re, place[0]), (f_im, place[1])], [(f_re, place[1]), (minus_im, place[0])])
                    plgpu.commit_smem()  # the whole warpgroup has read what the product replaces
                    re, im = (row_vector(scratch["factors"].at[ka, part]) for part in (0, 1))

                    def turned(c, d):
                        """Times conj(f)."""
                        a, b = (along_rows(part, c.shape[1]) for part in (re, im))
                        return (a * c + b * d).astype(dtype), (a * d - b * c).astype(dtype)

                    for part, value in zip(place, by_columns(turned, *g), strict=True):
                        part[...] = value

                pl.loop(0, pieces)(functools.partial(sum_over_k1, slot))

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last results have left their places
                meet()

                mine = pl.ds(pl.multiple_of(lax.rem(group, pieces) * tile, tile), tile)
                share = group // pieces

                @pl.loop(0, pl.cdiv(quarter, shares))
                def _(turn):
                    a0, first = turn * shares + lax.rem(share, quarter), count * (share // quarter)

                    def add(k0, ys):
                        def more(re, im, *ys):
                            """The real part of conj(root) times the sum over k1."""
                            re, im = widened(re), widened(im)
                            at = (quarter * (first + a1) + a0 for a1 in range(count))
                            each = ((roots[k0, part, a] for part in (0, 1)) for a in at)
                            return tuple(y + c * re + d * im for y, (c, d) in zip(ys, each, strict=True))

                        sums = (load(scratch["panel"].at[slot, a0 * GROUPS + k0, part, :, mine]) for part in (0, 1))
                        return by_columns(more, *sums, *ys)

                    for a1, y in enumerate(lax.fori_loop(0, GROUPS, add, _zeros(count, tile))):
                        scratch["y"].at[quarter * (first + a1) + a0, :, mine][...] = y.astype(dtype)

                plgpu.commit_smem()
                meet()
                fetch(step + slots)
                for turn in range(radix // GROUPS):
                    a = turn * GROUPS + group
                    rows = pl.ds(pl.multiple_of(a * height, 16), height)
                    plgpu.copy_smem_to_gmem(scratch["y"].at[a, pl.ds(0, height)], out.at[sequence, rows, where])

        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "f": matrices((3, N1, N1), dtype, columns=tile),
        "factors": plgpu.SMEM((radix, 2, N1), F32),
        "panel": matrices((slots, radix, 2, N1, columns), dtype, columns=tile),
        "y": matrices((radix, N1, columns), dtype, columns=tile),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=4),
            "panel": plgpu.Barrier(num_arrivals=2 * radix, num_barriers=slots),
            "met": plgpu.Barrier(num_arrivals=GROUPS),
        },
    }
    return panels.launch(fft_conv_outer_radix_join, scratch, shapes.rows, BLOCK)
