"""Kernels for Hopper: the outer stages of a long sequence, `split` before the inner convolution and `join` after it.

A stage multiplies every column of a sequence's m rows of 4096 or 2048 steps by one matrix (`outer_plan`): real rows to
the real and the imaginary parts of as many complex ones, or these back to the real part of the result. Both are bound
by memory: with m = 128 rows the products take 85 FLOP a byte, of which an H200 does 184 while it moves one. A warpgroup
takes panels of 64 columns, 128 bytes of each row; rows that do not exist are zeros that TMA makes, or drops. Panels of
few rows are stacked, so that a product of 64 rows has several panels of the result and a copy is not too small. A gate
of the sequence multiplies as it comes in, one of the result before it leaves.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.chain import apply_gate
from pallas_kernels.fft_conv.config import BLOCK, N1, SHARED_MEMORY_BYTES, TILE
from pallas_kernels.fft_conv.mosaic import load, matrices, persistent_kernel, sums_of_products

_STAGING_SLOTS = 2
_MOST_PANEL_SLOTS = 4
_TILE_BYTES = 2 * N1 * TILE


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a stage is compiled for.

    Attributes:
      batch, channels, features: of the result; the axes before its rows.
      rows_in, rows_out: of a sequence, m or 2 m.
      dtype: of the sequences and the matrix: bfloat16 or float16.
      sequences: 1 if the channels share the sequence, C if each has its own.
      gates: 0 for none, 1 for one that the channels share, C for one of each.
      gate_in: whether the gate multiplies the sequence, or else the result.
      panels: of a sequence, those of 4096 or 2048 columns.
      blocks: in the persistent grid.
    """

    batch: int
    channels: int
    features: int
    rows_in: int
    rows_out: int
    dtype: Any
    sequences: int = 1
    gates: int = 0
    gate_in: bool = False
    panels: int = BLOCK // TILE
    blocks: int = 132

    @property
    def stack(self) -> int:
        """Panels that a product takes one above the other, by a matrix of as many blocks on its diagonal.

        As many as leave no tile half empty, of the sequence or of the result, with two tiles of the other at most.
        """
        few, many = sorted(_eights(rows) for rows in (self.rows_in, self.rows_out))
        count = 1
        while 2 * count * few <= N1 and 2 * count * many <= 2 * N1:
            count *= 2
        return count

    @property
    def tiles_in(self) -> int:
        """Tiles of 64 rows that hold a stack."""
        return pl.cdiv(self.stack * _eights(self.rows_in), N1)

    @property
    def tiles_out(self) -> int:
        return pl.cdiv(self.stack * _eights(self.rows_out), N1)

    @property
    def gate_tiles(self) -> int:
        return 0 if not self.gates else self.tiles_in if self.gate_in else self.tiles_out

    def pieces(self, tiles: int) -> list["_Piece"]:
        """The copies that move a stack of so many tiles."""
        if self.stack == 1 or not tiles:
            return [_Piece(at, at, 0, N1) for at in range(0, tiles * N1, N1)]
        height = tiles * N1 // self.stack
        return [_Piece(panel * height, 0, panel, height) for panel in range(self.stack)]

    def _bytes_left(self, groups: int) -> int:
        """Of shared memory, beside the matrix and results on their way."""
        used = self.tiles_in * self.tiles_out + groups * _STAGING_SLOTS
        return SHARED_MEMORY_BYTES - 1024 - _TILE_BYTES * used

    def _slots(self, groups: int) -> int:
        return self._bytes_left(groups) // (groups * _TILE_BYTES * (self.tiles_in + self.gate_tiles))

    @property
    def warpgroups(self) -> int:
        """As many, up to four, as have room for two stacks each beside the matrix."""
        return next(groups for groups in (4, 3, 2, 1) if groups == 1 or self._slots(groups) >= 2)

    @property
    def slots(self) -> int:
        """Stacks of a warpgroup in work or on their way."""
        return min(_MOST_PANEL_SLOTS, self._slots(self.warpgroups))

    @property
    def stacks(self) -> int:
        """Of a sequence."""
        return self.panels // self.stack

    @property
    def total(self) -> int:
        """Stacks of all sequences."""
        return self.batch * self.channels * self.features * self.stacks

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """`(B, C, D, rows, panels, 64)`."""
        shape = (self.batch, self.channels, self.features, self.rows_out, self.panels, TILE)
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def stacked(self, matrix: jax.Array) -> jax.Array:
        """The matrix `(rows_out, rows_in)` on the diagonal of `(tiles, 64, 64 tiles_in)`, as the kernel takes it."""
        out, into = (tiles * N1 // self.stack for tiles in (self.tiles_out, self.tiles_in))
        matrix = jnp.pad(matrix, ((0, out - matrix.shape[0]), (0, into - matrix.shape[1])))
        return jnp.kron(jnp.eye(self.stack), matrix).astype(self.dtype).reshape(self.tiles_out, N1, -1)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What one copy moves: so many rows of a panel.

    Attributes:
      target: their first row in shared memory.
      source: their first row in the sequence.
      panel: of the stack.
      rows: how many.
    """

    target: int
    source: int
    panel: int
    rows: int


def _eights(rows: int) -> int:
    """That many rows in whole tiles of shared memory."""
    return 8 * pl.cdiv(rows, 8)


def stage(shapes: Shapes):
    """The kernel (sequence, gate, matrix) -> result, all but the matrix `(B, channels, D, rows, panels, 64)`.

    The matrix is `Shapes.stacked`. An absent gate is not read.
    """
    dtype, groups, slots = shapes.dtype, shapes.warpgroups, shapes.slots
    grid = min(shapes.blocks, pl.cdiv(shapes.total, groups))
    steps = pl.cdiv(shapes.total, grid * groups)
    pieces_in, pieces_of_gate, pieces_out = map(shapes.pieces, (shapes.tiles_in, shapes.gate_tiles, shapes.tiles_out))
    copies_of_tile = len(pieces_out) // shapes.tiles_out

    def fft_conv_outer_stage(sequence, gate, matrix, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers = scratch["barriers"]

        def at(step):
            """(b, c, d, stack) of this warpgroup, and whether there is one. Neighbours in memory come at once."""
            number = (step * grid + lax.axis_index("block")) * groups + group
            row = number // shapes.stacks
            place = row // (shapes.channels * shapes.features), lax.rem(row // shapes.features, shapes.channels)
            inside = (step < steps) & (number < shapes.total)
            return *place, lax.rem(row, shapes.features), lax.rem(number, shapes.stacks), inside

        def part(of_sequence, stack, piece, step):
            """What a copy moves. TMA fills with zeros beyond the rows; Pallas checks no start that is not static."""
            rows = pl.ds(pl.multiple_of(piece.source + 0 * step, 8), piece.rows)
            return of_sequence.at[rows, stack * shapes.stack + piece.panel, pl.ds(0, TILE)]

        def fetch(step):
            b, c, d, stack, work = at(step)
            slot = lax.rem(step, slots)
            copies = [("panels", sequence, shapes.sequences, pieces_in)]
            if shapes.gates:
                copies.append(("gates", gate, shapes.gates, pieces_of_gate))

            @pl.when(work)
            def _():
                for name, source, channels, pieces in copies:
                    for piece in pieces:
                        plgpu.copy_gmem_to_smem(
                            part(source.at[b, c if channels > 1 else 0, d], stack, piece, step),
                            scratch[name].at[group, slot, pl.ds(piece.target, piece.rows)],
                            barriers["panels"].at[group * slots + slot],
                        )

        for ahead in range(slots - 1):
            fetch(jnp.int32(ahead))

        @pl.when(group == 0)
        def _():
            for tile in range(shapes.tiles_out):
                plgpu.copy_gmem_to_smem(matrix.at[tile], scratch["matrix"].at[tile], barriers["matrix"])

        plgpu.barrier_wait(barriers["matrix"])

        @pl.loop(0, steps)
        def _(step):
            b, c, d, stack, work = at(step)
            slot = lax.rem(step, slots)
            fetch(step + slots - 1)

            def tile_of(name, tile):
                return scratch[name].at[group, slot, pl.ds(tile * N1, N1)]

            @pl.when(work)
            def _():
                plgpu.barrier_wait(barriers["panels"].at[group * slots + slot])
                if shapes.gates and shapes.gate_in:
                    for tile in range(shapes.tiles_in):
                        x = tile_of("panels", tile)
                        x[...] = apply_gate(load(x), load(tile_of("gates", tile)), dtype)
                    plgpu.commit_smem()
                for tile in range(shapes.tiles_out):
                    (y,) = sums_of_products([(scratch["matrix"].at[tile], scratch["panels"].at[group, slot])])
                    if shapes.gates and not shapes.gate_in:
                        y = apply_gate(y, load(tile_of("gates", tile)), dtype)
                    slot_out = lax.rem(step * shapes.tiles_out + tile, _STAGING_SLOTS)
                    staging = scratch["staging"].at[group, slot_out]
                    # The last tile but one has left its place.
                    plgpu.wait_smem_to_gmem((_STAGING_SLOTS - 1) * copies_of_tile, wait_read_only=True)
                    staging[...] = y.astype(dtype)
                    plgpu.commit_smem()
                    for piece in pieces_out[tile * copies_of_tile : (tile + 1) * copies_of_tile]:
                        source = staging.at[pl.ds(piece.target - tile * N1, piece.rows)]
                        plgpu.copy_smem_to_gmem(source, part(out.at[b, c, d], stack, piece, step))

        plgpu.wait_smem_to_gmem(0)

    depth = shapes.tiles_in * N1
    scratch = {
        "matrix": matrices((shapes.tiles_out, N1, depth), dtype, columns=TILE),
        "panels": matrices((groups, slots, depth, TILE), dtype),
        "staging": matrices((groups, _STAGING_SLOTS, N1, TILE), dtype),
        "barriers": {
            "matrix": plgpu.Barrier(num_arrivals=shapes.tiles_out),
            "panels": plgpu.Barrier(num_arrivals=len(pieces_in) + len(pieces_of_gate), num_barriers=groups * slots),
        },
    }
    if shapes.gates:
        scratch["gates"] = matrices((groups, slots, shapes.gate_tiles * N1, TILE), dtype)
    return persistent_kernel(fft_conv_outer_stage, shapes.result, scratch, grid, groups)
