"""Kernels for Hopper: the outer stages of 129 to 256 rows of 4096 steps, by two factors, real products first.

`outer_plan` has the algebra. A split multiplies real rows by F on the tensor cores, then by f, and sums four of the
results in registers, and a join does the same in the opposite order: with the sums next to the sequence instead, as
for more rows, the products would be complex ones, twice as many.

The four warpgroups of a block share a panel of 64 columns of all rows, of which each takes 16, and meet once a panel:
then all have read it, so that the next may come to its place, and what they made has to be copied out, a quarter each.
What they make has two places in turns. A warpgroup awaits the copies of its last quarter before it meets the others,
and nobody stores to a place before they have met.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.column_dft import radix_sums
from pallas_kernels.fft_conv.config import BLOCK, N1
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, by_columns, matrices, sums_of_products
from pallas_kernels.fft_conv.outer_panels import GROUPS, Panels, Shapes, along_rows, row_vector
from pallas_kernels.fft_conv.widening import widened

RADIX = 4


def _places(shapes: Shapes, step):
    """Of a step: the sequence, the columns of row a of four side by side, whether there is any work."""
    sequence, column, work = Panels(shapes).at(step)

    def side_by_side(a):
        return pl.ds(pl.multiple_of(a * BLOCK + column, shapes.columns), shapes.columns)

    return sequence, side_by_side, work


def _from_row(first, count: int, step):
    """So many rows; Pallas checks no start that is not static, and TMA fills with zeros beyond the last row."""
    return pl.ds(pl.multiple_of(first + 0 * step, 16), count)


def _mine(group):
    """A warpgroup's columns of a panel."""
    return pl.ds(pl.multiple_of(group * CHUNK, CHUNK), CHUNK)


def _load_tables(group, f, factors, scratch, barrier):
    @pl.when(group == 0)
    def _():
        for part in (0, 1):
            plgpu.copy_gmem_to_smem(f.at[part], scratch["f"].at[part], barrier)
        plgpu.copy_gmem_to_smem(factors, scratch["factors"], barrier)

    plgpu.barrier_wait(barrier)


def _factor(factors, a: int, columns: int):
    """Both parts of f for rows of a, which is not 0: for that f is 1."""
    return (along_rows(row_vector(factors.at[a - 1, part]), columns) for part in (0, 1))


def _meet(barrier):
    """After the copies out that this warpgroup has started have been read."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def split(shapes: Shapes):
    """The kernel (u, F, f) -> Z, `(sequences, *Panels.z)`.

    u is `(sequences, rows / 4, 4 x 4096)`, four rows side by side; F and f are `outer_plan.real_product_tables`.
    """
    plan, dtype, slots, columns = shapes.plan, shapes.dtype, shapes.slots, shapes.columns
    panels = Panels(shapes)

    def fft_conv_outer_radix4_split(u, f, factors, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers, mine = scratch["barriers"], _mine(lax.axis_index("warpgroup"))

        def fetch(step):
            sequence, side_by_side, work = _places(shapes, step)
            slot = lax.rem(step, slots)

            @pl.when(work & (group == 0))
            def _():
                for a in range(RADIX):  # 64 rows: F is zero beyond h of them
                    source = u.at[sequence, _from_row(0, N1, step), side_by_side(a)]
                    plgpu.copy_gmem_to_smem(source, scratch["panel"].at[slot, a], barriers["panel"].at[slot])

        for ahead in range(slots):
            fetch(jnp.int32(ahead))
        _load_tables(group, f, factors, scratch, barriers["tables"])

        @pl.loop(0, panels.steps)
        def _(step):
            _, _, work = panels.at(step)
            slot = lax.rem(step, slots)

            @pl.when(work)
            def _():
                plgpu.barrier_wait(barriers["panel"].at[slot])
                sources = [scratch["panel"].at[slot, a, :, mine] for a in range(RADIX)]
                products = [[(scratch["f"].at[part], source)] for source in sources for part in (0, 1)]

                def summed(*w):
                    """For each ka the parts of the sum over a of f times w."""
                    pairs = list(zip(w[::2], w[1::2], strict=True))
                    for a in range(1, RADIX):
                        c, d = pairs[a]
                        re, im = _factor(scratch["factors"], a, c.shape[1])
                        pairs[a] = re * c - im * d, re * d + im * c
                    return tuple(part.astype(dtype) for pair in radix_sums(pairs) for part in pair)

                for number, value in enumerate(by_columns(summed, *sums_of_products(*products))):
                    scratch["z"].at[slot, number // 2, number % 2, :, mine][...] = value
                plgpu.commit_smem()
                _meet(barriers["met"])
                fetch(step + slots)
                for part in (0, 1):
                    source = scratch["z"].at[slot, group, part, pl.ds(0, plan.height)]
                    target = panels.rows_of_z(out, step, part, group * plan.height, plan.height)
                    plgpu.copy_smem_to_gmem(source, target)

        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "f": matrices((2, N1, N1), dtype, columns=CHUNK),
        "factors": plgpu.SMEM((RADIX - 1, 2, N1), F32),
        "panel": matrices((slots, RADIX, N1, columns), dtype, columns=CHUNK),
        "z": matrices((slots, RADIX, 2, N1, columns), dtype, columns=CHUNK),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=3),
            "panel": plgpu.Barrier(num_arrivals=RADIX, num_barriers=slots),
            "met": plgpu.Barrier(num_arrivals=GROUPS),
        },
    }
    return panels.launch(fft_conv_outer_radix4_split, scratch, *panels.z)


def join(shapes: Shapes):
    """The kernel (w, F, f) -> y, `(sequences, rows / 4, 4 x 4096)`; w is like the result of `split`, the tables its."""
    plan, dtype, slots, columns = shapes.plan, shapes.dtype, shapes.slots, shapes.columns
    panels = Panels(shapes)

    def fft_conv_outer_radix4_join(w, f, factors, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers, mine = scratch["barriers"], _mine(lax.axis_index("warpgroup"))

        def fetch(step):
            _, _, work = panels.at(step)
            slot = lax.rem(step, slots)

            @pl.when(work & (group == 0))
            def _():
                for ka in range(RADIX):
                    for part in (0, 1):  # 64 rows: F is zero beyond h of them
                        source = panels.rows_of_z(w, step, part, ka * plan.height, N1)
                        target = scratch["panel"].at[slot, ka, part]
                        plgpu.copy_gmem_to_smem(source, target, barriers["panel"].at[slot])

        for ahead in range(slots):
            fetch(jnp.int32(ahead))
        _load_tables(group, f, factors, scratch, barriers["tables"])

        @pl.loop(0, panels.steps)
        def _(step):
            sequence, side_by_side, work = _places(shapes, step)
            slot = lax.rem(step, slots)

            @pl.when(work)
            def _():
                plgpu.barrier_wait(barriers["panel"].at[slot])
                places = [scratch["panel"].at[slot, ka, part, :, mine] for ka in range(RADIX) for part in (0, 1)]

                def summed(*parts):
                    """For each a the parts of conj(f) times the sum over ka."""
                    parts = [widened(part) for part in parts]
                    # Conjugate roots: those of the split for the parts exchanged.
                    sums = radix_sums(list(zip(parts[1::2], parts[::2], strict=True)))
                    results = list(reversed(sums[0]))
                    for a, (d, c) in enumerate(sums[1:], 1):
                        re, im = _factor(scratch["factors"], a, c.shape[1])
                        results += [re * c + im * d, re * d - im * c]
                    return tuple(part.astype(dtype) for part in results)

                for place, value in zip(places, by_columns(summed, *places), strict=True):
                    place[...] = value
                plgpu.commit_smem()
                matrices_of_f = [scratch["f"].at[part].T for part in (0, 1)]
                products = [list(zip(matrices_of_f, places[2 * a : 2 * a + 2], strict=True)) for a in range(RADIX)]
                for a, y in enumerate(sums_of_products(*products)):
                    scratch["y"].at[slot, a, :, mine][...] = y.astype(dtype)
                plgpu.commit_smem()
                _meet(barriers["met"])
                fetch(step + slots)
                source = scratch["y"].at[slot, group, pl.ds(0, plan.height)]
                plgpu.copy_smem_to_gmem(source, out.at[sequence, _from_row(0, plan.height, step), side_by_side(group)])

        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "f": matrices((2, N1, N1), dtype, columns=CHUNK),
        "factors": plgpu.SMEM((RADIX - 1, 2, N1), F32),
        "panel": matrices((slots, RADIX, 2, N1, columns), dtype, columns=CHUNK),
        "y": matrices((slots, RADIX, N1, columns), dtype, columns=CHUNK),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=3),
            "panel": plgpu.Barrier(num_arrivals=2 * RADIX, num_barriers=slots),
            "met": plgpu.Barrier(num_arrivals=GROUPS),
        },
    }
    return panels.launch(fft_conv_outer_radix4_join, scratch, shapes.rows // RADIX, RADIX * BLOCK)
