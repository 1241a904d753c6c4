"""Kernels for Hopper: the outer stages of 129 to 256 rows of 4096 steps, by two factors, real products first.

`outer_plan` has the algebra. A split multiplies real rows by F on the tensor cores, then by f, and sums four of the
results in registers, and a join does the same in the opposite order: with the sums next to the sequence instead, as
for more rows, the products would be complex ones, twice as many.

The four warpgroups of a block share a panel of 64 columns of all rows, of which each takes 16, and of what they make of
it each copies a quarter out. None waits for the others right after its work: it has the products of its next panel
first, and then copies the last quarter out, so that some have the tensor cores while others add. What they make has two
places in turns. A warpgroup awaits the copy of its quarter before it says that it has made the next one, and nobody
stores to a place before all have said so of the other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.column_dft import radix_sums
from pallas_kernels.fft_conv.config import BLOCK, N1
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, by_columns, load, matrices, sums_of_products
from pallas_kernels.fft_conv.outer_panels import GROUPS, Panels, Shapes, along_rows, load_tables, row_vector
from pallas_kernels.fft_conv.widening import widened

RADIX = 4


def _columns(first, count: int):
    """So many of them."""
    return pl.ds(pl.multiple_of(first, count), count)


def _from_row(first, count: int, step):
    """So many rows; Pallas checks no start that is not static, and TMA fills with zeros beyond the last row."""
    return pl.ds(pl.multiple_of(first + 0 * step, 16), count)


def _factor(factors, a: int, columns: int):
    """Both parts of f for rows of a, which is not 0: for that f is 1."""
    return (along_rows(row_vector(factors.at[a - 1, part]), columns) for part in (0, 1))


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """What a warpgroup waits for, in the order of its steps.

    Attributes:
      panels: those of the block.
      barriers: in shared memory, those of `_barriers`.
      fetch: starts the copies of a step's panel.
      store: starts those of this warpgroup's quarter of what a step made.
    """

    panels: Panels
    barriers: Any
    fetch: Callable
    store: Callable

    def begin(self, group, f, factors, scratch):
        """Starts the copies of the first panels, and brings the tables."""
        for ahead in range(self.panels.shapes.slots):
            self.fetch(jnp.int32(ahead))
        load_tables(group, f, factors, scratch, self.barriers["tables"])

    def panel(self, slot):
        """Waits for the panel of a step."""
        plgpu.barrier_wait(self.barriers["panel"].at[slot])

    def store_last(self, step):
        """Once all have made it, what the step before has made; its place is the other one."""

        @pl.when(step > 0)
        def _():
            self._store(step - 1)

    def panel_read(self, slot):
        """Says that this warpgroup needs the panel no more."""
        plgpu.barrier_arrive(self.barriers["read"].at[slot])

    def made(self):
        """Says so, and that what this warpgroup last copied out has left its place."""
        plgpu.commit_smem()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.barriers["made"])

    def fetch_next(self, step, slot):
        """The panel that comes to the place of this step's, once all have read that."""

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            plgpu.barrier_wait(self.barriers["read"].at[slot])
            self.fetch(step + self.panels.shapes.slots)

    def finish(self):
        """What the last step has made."""
        self._store(self.panels.last)
        plgpu.wait_smem_to_gmem(0)

    def _store(self, step):
        plgpu.barrier_wait(self.barriers["made"])
        self.store(step)


def _barriers(shapes: Shapes, copies: int):
    """Of a kernel whose panel comes in so many copies."""
    return {
        "tables": plgpu.Barrier(num_arrivals=3),
        "panel": plgpu.Barrier(num_arrivals=copies, num_barriers=shapes.slots),
        "read": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=shapes.slots),
        "made": plgpu.Barrier(num_arrivals=GROUPS),
    }


def split(shapes: Shapes):
    """The kernel (u, F, f) -> Z, `(sequences, *Panels.z)`.

    u is `(sequences, rows / 4, 4 x 4096)`, four rows side by side; F and f are `outer_plan.real_product_tables`.
    """
    plan, dtype, slots, columns = shapes.plan, shapes.dtype, shapes.slots, shapes.columns
    panels = Panels(shapes)

    def fft_conv_outer_radix4_split(u, f, factors, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers, mine = scratch["barriers"], _columns(lax.axis_index("warpgroup") * CHUNK, CHUNK)

        def fetch(step):
            sequence, column, work = panels.at(step)
            slot = lax.rem(step, slots)

            @pl.when(work & (group == 0))
            def _():
                for a in range(RADIX):  # 64 rows: F is zero beyond h of them
                    source = u.at[sequence, _from_row(0, N1, step), _columns(a * BLOCK + column, columns)]
                    plgpu.copy_gmem_to_smem(source, scratch["panel"].at[slot, a], barriers["panel"].at[slot])

        def store(step):
            for part in (0, 1):
                source = scratch["z"].at[lax.rem(step, slots), group, part, pl.ds(0, plan.height)]
                target = panels.rows_of_z(out, step, part, group * plan.height, plan.height)
                plgpu.copy_smem_to_gmem(source, target)

        schedule = _Schedule(panels, barriers, fetch, store)
        schedule.begin(group, f, factors, scratch)

        @pl.loop(0, panels.steps)
        def _(step):
            _sequence, _column, work = panels.at(step)
            slot = lax.rem(step, slots)

            @pl.when(work)
            def _():
                schedule.panel(slot)
                sources = [scratch["panel"].at[slot, a, :, mine] for a in range(RADIX)]
                f_parts = [load(scratch["f"].at[part]) for part in (0, 1)]
                w = sums_of_products(*([(part, u_a)] for u_a in sources for part in f_parts))
                schedule.panel_read(slot)
                schedule.store_last(step)

                def summed(*w):
                    """For each ka the parts of the sum over a of f times w."""
                    pairs = list(zip(w[::2], w[1::2], strict=True))
                    for a in range(1, RADIX):
                        c, d = pairs[a]
                        re, im = _factor(scratch["factors"], a, c.shape[1])
                        pairs[a] = re * c - im * d, re * d + im * c
                    return tuple(part.astype(dtype) for pair in radix_sums(pairs) for part in pair)

                for number, value in enumerate(by_columns(summed, *w)):
                    scratch["z"].at[slot, number // 2, number % 2, :, mine][...] = value
                schedule.made()
                schedule.fetch_next(step, slot)

        schedule.finish()

    scratch = {
        "f": matrices((2, N1, N1), dtype, columns=CHUNK),
        "factors": plgpu.SMEM((RADIX - 1, 2, N1), F32),
        "panel": matrices((slots, RADIX, N1, columns), dtype, columns=CHUNK),
        "z": matrices((slots, RADIX, 2, N1, columns), dtype, columns=CHUNK),
        "barriers": _barriers(shapes, RADIX),
    }
    return panels.launch(fft_conv_outer_radix4_split, scratch, *panels.z)


def join(shapes: Shapes):
    """The kernel (w, F, f) -> y, `(sequences, rows / 4, 4 x 4096)`; w is like the result of `split`, the tables its."""
    plan, dtype, slots, columns = shapes.plan, shapes.dtype, shapes.slots, shapes.columns
    panels = Panels(shapes)

    def fft_conv_outer_radix4_join(w, f, factors, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers, mine = scratch["barriers"], _columns(lax.axis_index("warpgroup") * CHUNK, CHUNK)

        def fetch(step):
            _sequence, _column, work = panels.at(step)
            slot = lax.rem(step, slots)

            @pl.when(work & (group == 0))
            def _():
                for ka in range(RADIX):
                    for part in (0, 1):  # 64 rows: F is zero beyond h of them
                        source = panels.rows_of_z(w, step, part, ka * plan.height, N1)
                        target = scratch["panel"].at[slot, ka, part]
                        plgpu.copy_gmem_to_smem(source, target, barriers["panel"].at[slot])

        def store(step):
            sequence, column, _work = panels.at(step)
            source = scratch["y"].at[lax.rem(step, slots), group, pl.ds(0, plan.height)]
            where = _columns(group * BLOCK + column, columns)
            plgpu.copy_smem_to_gmem(source, out.at[sequence, _from_row(0, plan.height, step), where])

        schedule = _Schedule(panels, barriers, fetch, store)
        schedule.begin(group, f, factors, scratch)

        @pl.loop(0, panels.steps)
        def _(step):
            _sequence, _column, work = panels.at(step)
            slot = lax.rem(step, slots)

            @pl.when(work)
            def _():
                schedule.panel(slot)
                places = [scratch["panel"].at[slot, ka, part, :, mine] for ka in range(RADIX) for part in (0, 1)]

                def summed(*parts):
                    """For each a the parts of conj(f) times the sum over ka."""
                    w = [widened(part) for part in parts]
                    # Conjugate roots: those of the split for the parts exchanged.
                    (im_0, re_0), *others = radix_sums(list(zip(w[1::2], w[::2], strict=True)))
                    results = [re_0, im_0]
                    for a, (d, c) in enumerate(others, 1):
                        re, im = _factor(scratch["factors"], a, c.shape[1])
                        results += [re * c + im * d, re * d - im * c]
                    return tuple(part.astype(dtype) for part in results)

                for place, value in zip(places, by_columns(summed, *places), strict=True):
                    place[...] = value
                plgpu.commit_smem()
                schedule.store_last(step)
                transposed = [load(scratch["f"].at[part]) for part in (0, 1)]
                products = (zip(transposed, places[2 * a : 2 * a + 2], strict=True) for a in range(RADIX))
                y = sums_of_products(*map(list, products))
                schedule.panel_read(slot)
                for a, y_a in enumerate(y):
                    scratch["y"].at[slot, a, :, mine][...] = y_a.astype(dtype)
                schedule.made()
                schedule.fetch_next(step, slot)

        schedule.finish()

    scratch = {
        "f": matrices((2, N1, N1), dtype, columns=CHUNK),
        "factors": plgpu.SMEM((RADIX - 1, 2, N1), F32),
        "panel": matrices((slots, RADIX, 2, N1, columns), dtype, columns=CHUNK),
        "y": matrices((slots, RADIX, N1, columns), dtype, columns=CHUNK),
        "barriers": _barriers(shapes, 2 * RADIX),
    }
    return panels.launch(fft_conv_outer_radix4_join, scratch, shapes.rows // RADIX, RADIX * BLOCK)
