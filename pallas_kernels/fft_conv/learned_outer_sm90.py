"""The kernel of the outer blocks' cotangents in a learned long sequence: one matrix product over all columns there are.

The cotangent of F0 is the sum of dZ u^T over batch, features and 4096 columns, that of V0^H the sum of W g^T
(`learned_three_pass`): products of 2 m by n rows, each row as long as all sequences in a line. They are bound by memory
and have nothing to do but to read each number once: with m = 128 they take 85 FLOP a byte, of which an H200 does 184
while it moves one. And what has read a panel of dZ can join it, too, to du = Re F0^H dZ, by one more product. In bytes
of u that is 4 for dZ and 3 for W, where a join and two products took 9, of the 23 of a backward pass.

A warpgroup takes panels of 64 columns, and keeps the sum of all of its products in registers until the end. A product
has 64 rows of Z at least. Where a sequence has fewer, several are taken for one: what they give is on the diagonal of
the product of their panels, and the rest is dropped. Where it has more than 128, each of several warpgroups takes 64 of
them, and all of the other rows, which only one of them reads from beyond the cache; those cannot join.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.config import BLOCK, N1, SHARED_MEMORY_BYTES, TILE
from pallas_kernels.fft_conv.mosaic import F32, add_products, matrices, persistent_kernel

PANELS = BLOCK // TILE
"""Of a sequence."""

_MOST_TILES = 4
_MOST_GROUPS = 4
_MOST_SLOTS = 4
_MOST_OWN = 2
"""Tiles of 64 rows of Z whose sums a warpgroup has registers for, of at most 64 columns."""
_TILE_BYTES = 2 * N1 * TILE


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the kernel is compiled for.

    Attributes:
      sequences: in all.
      rows_of_z: of a sequence, both parts.
      rows_of_x: of a real one, at most half as many, or these in whole eights.
      dtype: of both and of the matrix: bfloat16 or float16.
      joins: whether the rows of Z are joined, too.
      blocks: in the persistent grid.

    Raises:
      ValueError: for rows that no product takes, that do not fill tiles of eight or that the kernel cannot join.

    Example:
      >>> Shapes(6, 8, 4, jnp.bfloat16).together, Shapes(6, 256, 128, jnp.bfloat16).tiles
      (8, 4)
    """

    sequences: int
    rows_of_z: int
    rows_of_x: int
    dtype: Any
    joins: bool = False
    blocks: int = 132

    def __post_init__(self):
        if any(self.sequences * rows % 8 for rows in (self.rows_of_z, self.rows_of_x)):
            raise ValueError(f"rows must fill tiles of eight; got {self}.")
        if self.tiles > _MOST_TILES or self.columns > N1 * (1 + (self.own == 1)):
            raise ValueError(f"rows must fit a product of {_MOST_TILES * N1} x {2 * N1}; got {self}.")
        if self.joins and not self.can_join:
            raise ValueError(f"the kernel joins at most {_MOST_OWN * N1} rows; got {self}.")

    @property
    def together(self) -> int:
        """Sequences that are taken for one, so that their rows fill tiles of eight and, if so many fit, one of 64."""
        both = self.rows_of_z, self.rows_of_x
        count = next(count for count in (1, 2, 4, 8) if not any(count * rows % 8 for rows in both))
        while 2 * count * max(both) <= N1:
            count *= 2
        return count

    @property
    def rows(self) -> int:
        """Of a product."""
        return self.together * self.rows_of_z

    @property
    def columns(self) -> int:
        """Of a product."""
        return self.together * self.rows_of_x

    @property
    def tiles(self) -> int:
        """Of 64 rows of a product; the last may have fewer."""
        return pl.cdiv(self.rows, N1)

    @property
    def own(self) -> int:
        """Those of a warpgroup: all, or one of too many."""
        return self.tiles if self.tiles <= _MOST_OWN else 1

    @property
    def can_join(self) -> bool:
        """Whether a warpgroup has all rows of its panels."""
        return self.own == self.tiles and self.columns <= N1

    @property
    def sharers(self) -> int:
        """Warpgroups that work on the same panels."""
        return self.tiles // self.own

    def _slots(self, groups: int) -> int:
        matrix, staging = (self.own, groups) if self.joins else (0, 0)
        left = SHARED_MEMORY_BYTES - 1024 - _TILE_BYTES * (matrix + staging)
        return left // (groups * (self.own * _TILE_BYTES + 2 * self.columns * TILE))

    @property
    def warpgroups(self) -> int:
        """As many as have room for two pairs of panels each."""
        most = _MOST_GROUPS // self.sharers * self.sharers
        return next(groups for groups in range(most, 0, -self.sharers) if self._slots(groups) >= 2)

    @property
    def slots(self) -> int:
        """Pairs of panels of a warpgroup in work or on their way."""
        return min(_MOST_SLOTS, self._slots(self.warpgroups))

    @property
    def total(self) -> int:
        """Pairs of panels."""
        return pl.cdiv(self.sequences, self.together) * PANELS

    @property
    def grid(self) -> int:
        return min(self.blocks, pl.cdiv(self.total * self.sharers, self.warpgroups))

    @property
    def streams(self) -> int:
        """Of pairs, each with a sum of its own."""
        return self.grid * self.warpgroups // self.sharers

    def cotangent(self, sums: jax.Array) -> jax.Array:
        """`(rows_of_z, rows_of_x)` of what the kernel gives."""
        whole = sums.sum(0)[: self.rows].reshape(self.together, self.rows_of_z, self.together, self.rows_of_x)
        return jnp.einsum("aiaj->ij", whole)

    def stacked(self, matrix: jax.Array) -> jax.Array:
        """The matrix of a join, at most `(rows_of_x, rows_of_z)`, as the kernel takes it.

        Sequences that one product joins meet zeros of it: a number that is not finite in one reaches them all.
        """
        padding = zip((self.rows_of_x, self.rows_of_z), matrix.shape, strict=True)
        matrix = jnp.kron(jnp.eye(self.together), jnp.pad(matrix, [(0, size - has) for size, has in padding]))
        return jnp.pad(matrix, ((0, N1 - self.columns), (0, self.own * N1 - self.rows))).astype(self.dtype)


def product(shapes: Shapes):
    """The kernel (z, x) -> (sums,), or (z, x, matrix) -> (sums, y), which is z joined by `Shapes.stacked`.

    z, x and y are rows of all sequences, `(sequences * rows, 64, 64)`; the sums, each over some of the sequences and
    columns, are `(streams, 64 tiles, columns)` in float32.
    """
    groups, slots, own, sharers = shapes.warpgroups, shapes.slots, shapes.own, shapes.sharers
    steps = pl.cdiv(shapes.total, shapes.streams)

    def learned_outer_product(z, x, *refs, scratch):
        matrix, sums, y = refs if shapes.joins else (None, *refs, None)
        group = lax.axis_index("warpgroup")
        tile = lax.rem(group, sharers)  # the first of its own
        # Those that share a product are neighbours, and neighbours in memory come at once.
        stream = lax.axis_index("block") * (groups // sharers) + group // sharers

        def at(step):
            """First of the sequences, panel, and whether there are any."""
            number = step * shapes.streams + stream
            return number // PANELS, lax.rem(number, PANELS), (step < steps) & (number < shapes.total)

        def part(of_all, start, rows, panel):
            """TMA fills with zeros beyond the last sequence, or writes nothing."""
            return of_all.at[pl.ds(pl.multiple_of(start, 8), rows), panel, pl.ds(0, TILE)]

        def fetch(step):
            first, panel, work = at(step)
            slot = lax.rem(step, slots)

            def copy(source, target):
                plgpu.copy_gmem_to_smem(source, target, scratch["arrived"].at[group * slots + slot])

            def copy_z(tile):
                start, rows = tile * N1, min(own * N1, shapes.rows - tile * N1)
                source = part(z, first * shapes.rows + start, rows, panel)
                copy(source, scratch["z"].at[group, slot, pl.ds(0, rows)])

            @pl.when(work)
            def _():
                copy(part(x, first * shapes.columns, shapes.columns, panel), scratch["x"].at[group, slot])
                for sharer in range(sharers):
                    pl.when(tile == sharer)(functools.partial(copy_z, sharer))

        def zeros(columns, dtype=F32):
            return plgpu.layout_cast(jnp.zeros((N1, columns), dtype), plgpu.Layout.WGMMA)

        def tile_of_z(slot, number):
            return scratch["z"].at[group, slot, pl.ds(number * N1, N1)]

        if shapes.rows % N1:  # rows of the last tile that no copy writes, which a join would multiply by zero
            for slot in range(slots):
                tile_of_z(slot, own - 1)[...] = zeros(TILE, shapes.dtype)
            plgpu.commit_smem()
        for ahead in range(slots - 1):
            fetch(jnp.int32(ahead))

        if shapes.joins:

            @pl.when(group == 0)
            def _():
                plgpu.copy_gmem_to_smem(matrix, scratch["matrix"], scratch["matrix_arrived"])

            plgpu.barrier_wait(scratch["matrix_arrived"])

        def turn(step, totals):
            first, panel, work = at(step)
            slot = lax.rem(step, slots)
            fetch(step + slots - 1)

            def add(totals):
                plgpu.barrier_wait(scratch["arrived"].at[group * slots + slot])
                panels = scratch["x"].at[group, slot].T
                products = [[(tile_of_z(slot, number), panels)] for number in range(own)]
                if not shapes.joins:
                    totals = add_products(totals, *products)
                    plgpu.commit_smem()  # the whole warpgroup has read what the next copy replaces
                    return tuple(totals)
                join = [(scratch["matrix"], scratch["z"].at[group, slot])]
                *totals, joined = add_products((*totals, zeros(TILE)), *products, join)
                staging = scratch["staging"].at[group]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last panel has left its place
                staging[...] = joined.astype(shapes.dtype)
                plgpu.commit_smem()
                target = part(y, first * shapes.columns, shapes.columns, panel)
                plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, shapes.columns)], target)
                return tuple(totals)

            return lax.cond(work, add, lambda totals: totals, totals)

        totals = lax.fori_loop(0, steps, turn, (zeros(shapes.columns),) * own)
        for number, total in enumerate(totals):
            sums[stream, pl.ds((tile + number) * N1, N1)] = total
        plgpu.wait_smem_to_gmem(0)

    dtype = shapes.dtype
    scratch = {
        "z": matrices((groups, slots, own * N1, TILE), dtype),
        "x": matrices((groups, slots, shapes.columns, TILE), dtype),
        "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=groups * slots),
    }
    results = [jax.ShapeDtypeStruct((shapes.streams, shapes.tiles * N1, shapes.columns), F32)]
    if shapes.joins:
        scratch["matrix"] = matrices((N1, own * N1), dtype, columns=TILE)
        scratch["matrix_arrived"] = plgpu.Barrier(num_arrivals=1)
        scratch["staging"] = matrices((groups, N1, TILE), dtype)
        results.append(jax.ShapeDtypeStruct((shapes.sequences * shapes.rows_of_x, N1, TILE), dtype))
    return persistent_kernel(learned_outer_product, results, scratch, shapes.grid, groups)
