"""Kernels for Hopper: the outer stages of 129 to 256 rows of 4096 steps, by two factors, real products first.

`outer_plan` has the algebra. A split multiplies real rows by F on the tensor cores, then by f, and sums four of the
results in registers, and a join does the same in the opposite order: with the sums next to the sequence instead, as
for more rows, the products would be complex ones, twice as many.

The four warpgroups of a block share a panel of 64 columns of all rows, two of them 32 columns: one has the even terms
a and the other the odd ones. Of a split each makes of its two the share of all sums, and leaves to the other, rounded,
the half that goes into the other's results. Of a join both read what they share, and each makes the sums for its a.
Columns come and go 32 at a time, 64 bytes of a row of memory: in tiles of 16 columns the copies alone took as long as
the whole stage did, 102 ms for 49,152 sequences of 1,048,576 steps, and in these 89 (64 columns: 91).

Of what a panel's warpgroups make each copies a quarter out. None but the other of its pair waits for it right after its
work: it has the products of its next panel, or of a join the sums, first, and then copies the last quarter out, so that
some have the tensor cores while others add. What they make has two places in turns. A warpgroup awaits the copy of its
quarter before it says that it has made the next one, and nobody stores to a place before all have said so of the other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.config import BLOCK, N1
from pallas_kernels.fft_conv.mosaic import F32, by_columns, load, matrices, sums_of_products
from pallas_kernels.fft_conv.outer_panels import GROUPS, Panels, Shapes, along_rows, load_tables, row_vector
from pallas_kernels.fft_conv.widening import widened

RADIX = 4
_PAIR = 2
"""Warpgroups that share columns, those of a tile."""


def _columns(first, count: int):
    """So many of them."""
    return pl.ds(pl.multiple_of(first, count), count)


def _from_row(first, count: int, step):
    """So many rows; Pallas checks no start that is not static, and TMA fills with zeros beyond the last row."""
    return pl.ds(pl.multiple_of(first + 0 * step, 16), count)


def _turned(factors, a: int, c, d, conjugate: bool = False):
    """The complex c + i d times f, or its conjugate, of rows of a; for 0 that is 1."""
    if a == 0:
        return c, d
    re, im = (along_rows(row_vector(factors.at[a - 1, part]), c.shape[1]) for part in (0, 1))
    if conjugate:
        return re * c + im * d, re * d - im * c
    return re * c - im * d, re * d + im * c


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

    def meet(self, half):
        """Waits for the other warpgroup of the same columns."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.barriers["pair"].at[half])
        plgpu.barrier_wait(self.barriers["pair"].at[half])

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
        "pair": plgpu.Barrier(num_arrivals=_PAIR, num_barriers=GROUPS // _PAIR),
    }


def split(shapes: Shapes):
    """The kernel (u, F, f) -> Z, `(sequences, *Panels.z)`.

    u is `(sequences, rows / 4, 4 x 4096)`, four rows side by side; F and f are `outer_plan.real_product_tables`.
    """
    plan, dtype, slots, columns = shapes.plan, shapes.dtype, shapes.slots, shapes.columns
    panels = Panels(shapes)

    def fft_conv_outer_radix4_split(u, f, factors, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers, pair = scratch["barriers"], group // _PAIR
        mine = _columns(pair * shapes.tile, shapes.tile)

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

            def terms(first):
                """Those of even or odd a, the first of them 0 or 1."""
                schedule.panel(slot)
                ours = range(first, RADIX, 2)
                planes = [scratch["f"].at[part] for part in (0, 1)]
                w = sums_of_products(
                    *([(plane, scratch["panel"].at[slot, a, :, mine])] for a in ours for plane in planes)
                )
                schedule.panel_read(slot)
                schedule.store_last(step)

                def turned(*w):
                    """The share of the sums whose parity is this one's, in float32, and the other's, rounded."""
                    pairs = [
                        _turned(scratch["factors"], a, *w[at : at + 2]) for at, a in zip((0, 2), ours, strict=True)
                    ]
                    (a, b), (c, d) = pairs
                    total, difference = (a + c, b + d), (a - c, b - d)
                    kept, sent = (difference, total) if first else (total, difference)
                    return *kept, *(part.astype(dtype) for part in sent)

                *kept, re, im = by_columns(turned, *w)
                inbox, outbox = (
                    [scratch["z"].at[slot, ka, part, :, mine] for part in (0, 1)] for ka in (first, 1 - first)
                )
                for place, value in zip(outbox, (re, im), strict=True):
                    place[...] = value
                schedule.meet(pair)

                def summed(a, b, *others):
                    """For ka = first and first + 2 the parts of the sum of even and odd terms."""
                    c, d = map(widened, others)
                    if first:  # these are the even ones; -i times the odd ones
                        a, b, c, d = c, d, b, -a
                    return tuple(part.astype(dtype) for part in (a + c, b + d, a - c, b - d))

                values = by_columns(summed, *kept, *map(load, inbox))
                for number, value in enumerate(values):
                    scratch["z"].at[slot, first + number // 2 * 2, number % 2, :, mine][...] = value
                schedule.made()
                schedule.fetch_next(step, slot)

            for first in range(_PAIR):
                pl.when(work & (lax.rem(group, _PAIR) == first))(functools.partial(terms, first))

        schedule.finish()

    scratch = {
        "f": matrices((2, N1, N1), dtype, columns=shapes.tile),
        "factors": plgpu.SMEM((RADIX - 1, 2, N1), F32),
        "panel": matrices((slots, RADIX, N1, columns), dtype, columns=shapes.tile),
        "z": matrices((slots, RADIX, 2, N1, columns), dtype, columns=shapes.tile),
        "barriers": _barriers(shapes, RADIX),
    }
    return panels.launch(fft_conv_outer_radix4_split, scratch, *panels.z)


def join(shapes: Shapes):
    """The kernel (w, F, f) -> y, `(sequences, rows / 4, 4 x 4096)`; w is like the result of `split`, the tables its."""
    plan, dtype, slots, columns = shapes.plan, shapes.dtype, shapes.slots, shapes.columns
    panels = Panels(shapes)

    def fft_conv_outer_radix4_join(w, f, factors, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers, pair = scratch["barriers"], group // _PAIR
        mine = _columns(pair * shapes.tile, shapes.tile)

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

            def terms(first):
                """Those of even or odd a, the first of them 0 or 1."""
                schedule.panel(slot)
                ours = range(first, RADIX, 2)
                places = [[scratch["panel"].at[slot, ka, part, :, mine] for part in (0, 1)] for ka in range(RADIX)]

                def of_two(a, b, c, d):
                    """Of terms ka = 0 and 2 the sum or the difference, in float32, or of 1 and 3."""
                    a, b, c, d = map(widened, (a, b, c, d))
                    return (a - c, b - d) if first else (a + c, b + d)

                def summed(c, d, *others):
                    """For each a of ours the parts of conj(f) times the sum over ka."""
                    a, b = of_two(*others)
                    if first:  # i times the odd terms
                        a, b = -b, a
                    sums = (c + a, d + b), (c - a, d - b)
                    turned = (
                        _turned(scratch["factors"], a, *parts, conjugate=True)
                        for a, parts in zip(ours, sums, strict=True)
                    )
                    return tuple(part.astype(dtype) for parts in turned for part in parts)

                kept = by_columns(of_two, *(load(place) for ka in (0, 2) for place in places[ka]))
                plgpu.commit_smem()  # lest the compiler load the other four planes before it adds these, and spill
                values = by_columns(summed, *kept, *(load(place) for ka in (1, 3) for place in places[ka]))
                schedule.meet(pair)  # both have read what these replace
                for number, value in enumerate(values):
                    places[ours[number // 2]][number % 2][...] = value
                plgpu.commit_smem()
                schedule.store_last(step)
                transposed = [scratch["f"].at[part].T for part in (0, 1)]
                y = sums_of_products(*(list(zip(transposed, places[a], strict=True)) for a in ours))
                schedule.panel_read(slot)
                for a, y_a in zip(ours, y, strict=True):
                    scratch["y"].at[slot, a, :, mine][...] = y_a.astype(dtype)
                schedule.made()
                schedule.fetch_next(step, slot)

            for first in range(_PAIR):
                pl.when(work & (lax.rem(group, _PAIR) == first))(functools.partial(terms, first))

        schedule.finish()

    scratch = {
        "f": matrices((2, N1, N1), dtype, columns=shapes.tile),
        "factors": plgpu.SMEM((RADIX - 1, 2, N1), F32),
        "panel": matrices((slots, RADIX, 2, N1, columns), dtype, columns=shapes.tile),
        "y": matrices((slots, RADIX, N1, columns), dtype, columns=shapes.tile),
        "barriers": _barriers(shapes, 2 * RADIX),
    }
    return panels.launch(fft_conv_outer_radix4_join, scratch, shapes.rows // RADIX, RADIX * BLOCK)
