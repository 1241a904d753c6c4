"""What the kernels of sequences of several blocks of 4096 steps have in common: sizes, who works on what, and steps.

A long convolution is a Toeplitz matrix of blocks. Each block is one too, of 2 * 4096 - 1 lags, and what the
right-angle transform of 4096 points multiplies by is just such a block (`tables`). So with X_j and Y_m the spectra of
blocks of u and of the result

    Y_m = sum_j K_(m-j) X_j

where K_l is the spectrum of the taps from lag 4096 (l - 1) + 1 to 4096 (l + 1) - 1. No zeros are transformed, any
number of blocks will do, and the tables are those of 4096 steps. It costs (J + 1) / 2 complex products for each of J
blocks instead of one, all on chip.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.chain import ByColumns, floats
from pallas_kernels.fft_conv.config import N1, SHARED_MEMORY_BYTES, TILE
from pallas_kernels.fft_conv.mosaic import CHUNK, PIECE, load, sums_of_products


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a kernel is compiled for.

    Attributes:
      batch, channels, features: B, C and D.
      length: rows of 64 that hold the sequence: a multiple of 8, from 65 to 512.
      lags: first and last lag of the blocks of taps, such as (0, J - 1) for a causal convolution.
      dtype: of u, the gates, the tables and the result: bfloat16 or float16.
      sequences: 1 if the channels share u, C if each has its own.
      pre_gates: gates that u is multiplied by first: 0 for none, 1 shared by the channels, C for one of each.
      post_gates: gates of the result, likewise.
      blocks: in the persistent grid.
    """

    batch: int
    channels: int
    features: int
    length: int
    lags: tuple[int, int]
    dtype: Any
    sequences: int = 1
    pre_gates: int = 0
    post_gates: int = 0
    blocks: int = 132

    @property
    def count(self) -> int:
        """Blocks of a sequence."""
        return pl.cdiv(self.length, N1)

    @property
    def team(self) -> int:
        """Warpgroups that work on a row."""
        return 2 if self.count == 2 else 4

    @property
    def teams(self) -> int:
        return 4 // self.team

    @property
    def most_lags(self) -> int:
        """Spectra of the taps that fit in shared memory: a convolution with more of them takes several launches."""
        # Tables take 48 KB since F2 is cut into blocks of 16 points; a lag more in the rest has not been timed.
        tables, matrix = 64 * 1024, 2 * N1 * TILE
        rest = SHARED_MEMORY_BYTES - tables - matrix * (2 * self.teams * self.count + self.team * self.teams)
        return rest // (2 * matrix)

    @property
    def dx_fits(self) -> bool:
        """Whether the backward kernel has room for the spectra of the taps, and so for the cotangent of u."""
        return len(self.lag_range) <= self.team * self.teams

    @property
    def lag_range(self) -> range:
        return range(self.lags[0], self.lags[1] + 1)

    @property
    def spectra(self) -> tuple[int, int, int]:
        """(D, C, lags)."""
        return self.features, self.channels, len(self.lag_range)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which item and which row a team works on at each step; an item is a spectrum of taps and a share of the batch.

    A batch is shared out where there are fewer spectra than blocks, and also, in shares of no fewer rows than `least`,
    so that blocks end together: with 768 spectra for 132 blocks the last turn would leave most of them idle, 3 % of the
    time.
    """

    shapes: Shapes
    least: int | None = None

    @property
    def spectra(self):
        return self.shapes.features * self.shapes.channels

    @property
    def splits(self):
        most = max(1, min(self.shapes.blocks // self.spectra, pl.cdiv(self.shapes.batch, self.shapes.teams)))
        if self.least is None:
            return most
        return min(range(1, max(most, self.shapes.batch // self.least) + 1), key=self._steps)

    def _steps(self, splits: int) -> int:
        turns = pl.cdiv(self.spectra * splits, self.shapes.blocks)
        return turns * pl.cdiv(pl.cdiv(self.shapes.batch, splits), self.shapes.teams)

    @property
    def rows(self):
        """Rows of one item."""
        return pl.cdiv(self.shapes.batch, self.splits)

    @property
    def items(self):
        return self.spectra * self.splits

    @property
    def grid(self):
        return min(self.shapes.blocks, self.items)

    @property
    def rounds(self):
        """Steps that a team spends on one item."""
        return pl.cdiv(self.rows, self.shapes.teams)

    @property
    def steps(self):
        return pl.cdiv(self.items, self.grid) * self.rounds

    def at(self, step, team):
        """(item, row of the batch, whether there is any work) of a team at this step."""
        item = lax.axis_index("block") + (step // self.rounds) * self.grid
        turn = lax.rem(step, self.rounds) * self.shapes.teams + team
        row = lax.rem(item, self.splits) * self.rows + turn
        return item, row, (step < self.steps) & (item < self.items) & (turn < self.rows) & (row < self.shapes.batch)

    def place(self, item):
        """(channel, feature) of an item."""
        spectrum = item // self.splits
        return lax.rem(spectrum, self.shapes.channels), spectrum // self.shapes.channels


def load_tables(f1, f2, twiddle, scratch):
    """Starts their copies."""
    for name, table in (("f1", f1), ("f2", f2), ("twiddle", twiddle)):
        for plane in range(table.shape[0]):
            plgpu.copy_gmem_to_smem(table.at[plane], scratch[name].at[plane], scratch["barriers"]["tables"])


def put(parts, spectrum: Callable[[], Any], dtype):
    """Writes what `column_dft.there` yields, as it comes, to planes in shared memory."""
    for k0, part in enumerate(parts):
        for plane, value in enumerate(part):
            spectrum().at[plane, :, pl.ds(k0 * CHUNK, CHUNK)][...] = value.astype(dtype)


def load_columns(ref):
    """A matrix in shared memory, read 16 columns at a time.

    All that reads or writes so, the tables and spectra too, has a thread's place in a matrix in common. Read whole,
    a matrix takes two more, which the compiler keeps over the whole loop.
    """
    return lax.concatenate([load(ref.at[:, pl.ds(at, CHUNK)]) for at in range(0, TILE, CHUNK)], 1)


def put_columns(ref, value):
    """Writes a matrix to shared memory likewise."""
    for at in range(0, TILE, CHUNK):
        ref.at[:, pl.ds(at, CHUNK)][...] = value[:, at : at + CHUNK]


def inverse(chain: ByColumns, planes, scratch):
    """The real row whose conjugate spectrum is in two planes in shared memory; scratch, (2, 64, 64), carries E."""
    ((*parts,),) = column_dft.back([tuple(map(load_columns, planes))], *chain._operands(back=True))
    for plane, part in enumerate(parts):
        put_columns(scratch.at[plane], part)
    plgpu.commit_smem()
    first = chain.first_block(transposed=True)
    (row,) = sums_of_products([(block, scratch.at[plane]) for plane, block in enumerate(first)])
    return row


def add_conj_product(total, x, k, adjoint: bool):
    """The sum of a total, or None, and conj(X K), or the adjoint's conj(conj(K) X), of pairs in float32.

    In this order each part is two fused operations.
    """
    (a, b), (c, d) = x, k
    re, im = total or (None, None)
    if adjoint:
        return (
            a * c + b * d if re is None else re + a * c + b * d,
            a * d - b * c if im is None else im + a * d - b * c,
        )
    return (
        a * c - b * d if re is None else re + a * c - b * d,
        -(a * d) - b * c if im is None else im - a * d - b * c,
    )


def block_products(xs, ks, shapes: Shapes, adjoint: bool = False):
    """Pairs of planes of conj(Y_m) of every block for some columns, 8 columns at a time in float32.

    The adjoint is that of Y_j = sum_m conj(K_(m-j)) X_m.
    """
    halves = []
    for at in range(0, CHUNK, PIECE):
        columns = slice(at, at + PIECE)
        x = [floats(*(plane[:, columns] for plane in planes)) for planes in xs]
        ys: list[Any] = [None] * shapes.count
        for k, lag in zip(ks, shapes.lag_range, strict=True):
            c, d = floats(*(plane[:, columns] for plane in k))
            for m in range(max(0, lag), min(shapes.count, shapes.count + lag)):
                source, target = (m, m - lag) if adjoint else (m - lag, m)
                ys[target] = add_conj_product(ys[target], x[source], (c, d), adjoint)
        zero = jnp.zeros_like(x[0][0])
        halves.append([(zero, zero) if y is None else y for y in ys])
    return [
        tuple(lax.concatenate([half[m][plane].astype(shapes.dtype) for half in halves], 1) for plane in (0, 1))
        for m in range(shapes.count)
    ]
