"""What the outer stages by two factors share: panels of columns, in turns for the blocks of a persistent grid."""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.config import BLOCK, N1
from pallas_kernels.fft_conv.mosaic import persistent_kernel
from pallas_kernels.fft_conv.outer_plan import OuterPlan

GROUPS = 4
"""Warpgroups of a block, which share a panel."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a stage is compiled for.

    Attributes:
      sequences: B C D, how many there are.
      rows: of the real sequence, at most those of the plan, a multiple of 8.
      plan: r and h.
      dtype: of the sequences and of F: bfloat16 or float16.
      blocks: in the persistent grid.
    """

    sequences: int
    rows: int
    plan: OuterPlan
    dtype: Any
    blocks: int = 132

    @property
    def quarter(self) -> int:
        """The quarter of r, q."""
        return self.plan.radix // GROUPS

    @property
    def columns(self) -> int:
        """Of a panel, as many as shared memory has room for."""
        return 64 if self.quarter == 1 else 32

    @property
    def tile(self) -> int:
        """Columns of a tile in shared memory: memory moves faster in pieces of 64 bytes than of 32.

        Of radix 16, sums of 16 columns are as many as there are registers for.
        """
        return 16 if self.quarter == 4 else 32

    @property
    def slots(self) -> int:
        """Panels on their way or in work."""
        return 1 if self.quarter == 4 else 2

    @property
    def panels(self) -> int:
        """Of all sequences."""
        return self.sequences * (BLOCK // self.columns)


@dataclasses.dataclass(frozen=True)
class Panels:
    """Which panel a block works on at each step."""

    shapes: Shapes

    @property
    def grid(self) -> int:
        """Blocks."""
        return min(self.shapes.blocks, self.shapes.panels)

    @property
    def steps(self) -> int:
        """Of the block that has the most."""
        return pl.cdiv(self.shapes.panels, self.grid)

    def at(self, step):
        """(sequence, first column, whether there are any). Neighbours in memory come at once."""
        columns = self.shapes.columns
        number = step * self.grid + lax.axis_index("block")
        panel = lax.rem(number, BLOCK // columns)
        inside = (step < self.steps) & (number < self.shapes.panels)
        return number // (BLOCK // columns), panel * columns, inside

    @property
    def z(self) -> tuple[int, int]:
        """Rows and columns of Z of a sequence: its parts one above the other, or of a paired plan side by side."""
        plan = self.shapes.plan
        return (plan.rows, 2 * BLOCK) if plan.paired else (2 * plan.rows, BLOCK)

    def rows_of_z(self, z, step, part: int, first, count: int):
        """So many rows of a part of Z in the panel of a step, in memory.

        Pallas checks no start that is not static, and TMA fills with zeros beyond the last row.
        """
        plan, columns = self.shapes.plan, self.shapes.columns
        sequence, column, _ = self.at(step)
        row, column = (first, part * BLOCK + column) if plan.paired else (part * plan.rows + first, column)
        rows = pl.ds(pl.multiple_of(row + 0 * step, 16), count)
        return z.at[sequence, rows, pl.ds(pl.multiple_of(column, columns), columns)]

    @property
    def last(self):
        """The last step at which this block has a panel."""
        return jnp.minimum(self.steps, pl.cdiv(self.shapes.panels - lax.axis_index("block"), self.grid)) - 1

    def launch(self, body, scratch, *result: int):
        """The kernel whose result has that shape behind the sequences."""
        out = jax.ShapeDtypeStruct((self.shapes.sequences, *result), self.shapes.dtype)
        return persistent_kernel(body, out, scratch, self.grid, GROUPS)


def load_tables(group, f, factors, scratch, barrier):
    """Lets the first warpgroup copy F, plane by plane, and f to their places, and waits for them."""

    @pl.when(group == 0)
    def _():
        for plane in range(f.shape[0]):
            plgpu.copy_gmem_to_smem(f.at[plane], scratch["f"].at[plane], barrier)
        plgpu.copy_gmem_to_smem(factors, scratch["factors"], barrier)

    plgpu.barrier_wait(barrier)


def row_vector(ref):
    """A number for each row of a matrix, in the registers of those that have the row."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def along_rows(vector, columns: int):
    """The matrix of so many columns that are all the vector."""
    return lax.broadcast_in_dim(vector, (N1, columns), (0,))
