"""Who works on what in the kernels between the outer stages of a learned long sequence, forward and backward.

Such a sequence is m rows of 64 x 64 complex points, row k0 with blocks and twiddles of its own (`outer_plan`). A block
of threads works on one k0 alone: it loads the tables once, and what it sums over its rows, the blocks' cotangents,
belongs to that k0. Its items are spectra of taps, one for each feature, with all of the batch or a share of it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
from jax import lax

from pallas_kernels.fft_conv.config import N1, TILE


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a kernel is compiled for.

    Attributes:
      batch, features: B and D.
      rows: m, those of a sequence, at most `blocks`.
      dtype: of the rows and the tables: bfloat16 or float16.
      blocks: in the persistent grid, at most; one for each multiprocessor is best.

    Raises:
      ValueError: for more rows than blocks.
    """

    batch: int
    features: int
    rows: int
    dtype: Any
    blocks: int = 132

    def __post_init__(self):
        if not 1 <= self.rows <= self.blocks:
            raise ValueError(f"rows must be from 1 to the {self.blocks} blocks; got {self.rows}.")

    @property
    def sequences(self) -> jax.ShapeDtypeStruct:
        """Of both parts of the rows, `(B, 1, D, re | im m, 64, 64)`."""
        return jax.ShapeDtypeStruct((self.batch, 1, self.features, 2 * self.rows, N1, TILE), self.dtype)


_ITEMS = 8
"""Of a block that shares spectra with others, at most: each item takes a spectrum and may leave partial sums."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which item and which sequence of the batch at each step.

    Neighbouring blocks have neighbouring k0, and those of one k0 visit its items with a stride of as many as they are.

    Attributes:
      shapes: what is to be done.
      workers: of a block, that take turns at an item's share of the batch.
    """

    shapes: Shapes
    workers: int

    @property
    def _most(self):
        """Blocks that there are for a k0."""
        return self.shapes.blocks // self.shapes.rows

    @functools.cached_property
    def splits(self):
        """Blocks that share a spectrum's batch: as many as make the fewest steps."""
        turns = pl.cdiv(self.shapes.batch, self.workers)
        most = max(1, min(turns, _ITEMS * self._most // self.shapes.features))

        def steps(splits):
            visits = pl.cdiv(self.shapes.features * splits, self._most)
            return visits * pl.cdiv(pl.cdiv(self.shapes.batch, splits), self.workers)

        return min(range(1, most + 1), key=steps)

    @property
    def batch(self):
        """Sequences of one item."""
        return pl.cdiv(self.shapes.batch, self.splits)

    @property
    def items(self):
        """Of one k0."""
        return self.shapes.features * self.splits

    @property
    def shares(self):
        """Blocks of one k0, each with a share of its items."""
        return min(self._most, self.items)

    @property
    def grid(self):
        return self.shapes.rows * self.shares

    @property
    def visits(self):
        """Items of a block; the last may not exist."""
        return pl.cdiv(self.items, self.shares)

    @property
    def rounds(self):
        """Steps that a worker spends on one item."""
        return pl.cdiv(self.batch, self.workers)

    @property
    def steps(self):
        return self.visits * self.rounds

    @property
    def k0(self):
        """This block's row of every sequence."""
        return lax.rem(lax.axis_index("block"), self.shapes.rows)

    @property
    def share(self):
        """Which of the blocks of its k0 this one is."""
        return lax.axis_index("block") // self.shapes.rows

    def item(self, visit):
        """Of this block; none if it is not below `items`."""
        return self.share + visit * self.shares

    def place(self, item):
        """(feature, share of the batch) of an item."""
        return item // self.splits, lax.rem(item, self.splits)

    def at(self, step, worker):
        """(feature, sequence of the batch, whether there is any work) of a worker, an int or its index."""
        item = self.item(step // self.rounds)
        feature, split = self.place(item)
        turn = lax.rem(step, self.rounds) * self.workers + worker
        sequence = split * self.batch + turn
        work = (step < self.steps) & (item < self.items) & (turn < self.batch) & (sequence < self.shapes.batch)
        return feature, sequence, work
