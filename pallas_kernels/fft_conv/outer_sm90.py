"""Kernels for Hopper: the outer stages of a long sequence, `split` before the inner convolution and `join` after it.

A stage multiplies every column of a sequence's m rows of 4096 steps by one matrix (`outer_plan`): real rows to the real
and the imaginary parts of as many complex ones, or these back to the real part of the result. Both are bound by memory:
with m = 128 rows the products take 85 FLOP a byte, of which an H200 does 184 while it moves one. A warpgroup takes
panels of 64 columns, 128 bytes of each row; rows that do not exist are zeros that TMA makes, or drops. A gate of the
sequence multiplies as it comes in, one of the result before it leaves.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.config import BLOCK, N1, SHARED_MEMORY_BYTES, TILE
from pallas_kernels.fft_conv.kernel_sm90 import _gated
from pallas_kernels.fft_conv.mosaic import load, matrices, sums_of_products

PANELS = BLOCK // TILE
"""Of a sequence."""

_PANEL_SLOTS = 2
_STAGING_SLOTS = 2


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
    blocks: int = 132

    @property
    def tiles_in(self) -> int:
        """Tiles of 64 rows that hold a panel of the sequence."""
        return pl.cdiv(self.rows_in, N1)

    @property
    def tiles_out(self) -> int:
        return pl.cdiv(self.rows_out, N1)

    @property
    def gate_tiles(self) -> int:
        return 0 if not self.gates else self.tiles_in if self.gate_in else self.tiles_out

    @property
    def warpgroups(self) -> int:
        """As many as have room for their panels beside the matrix."""
        tile = 2 * N1 * TILE
        rest = SHARED_MEMORY_BYTES - 1024 - tile * self.tiles_in * self.tiles_out
        return min(4, rest // (tile * (_PANEL_SLOTS * (self.tiles_in + self.gate_tiles) + _STAGING_SLOTS)))

    @property
    def panels(self) -> int:
        """Of all sequences."""
        return self.batch * self.channels * self.features * PANELS

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """`(B, C, D, rows, 4096)`."""
        return jax.ShapeDtypeStruct((self.batch, self.channels, self.features, self.rows_out, BLOCK), self.dtype)


def stage(shapes: Shapes):
    """The kernel (sequence, gate, matrix) -> result, all but the matrix `(B, channels, D, rows, 4096)`.

    The matrix is `(tiles, 64, 64 tiles_in)`, padded with zeros. An absent gate is not read.
    """
    dtype, groups = shapes.dtype, shapes.warpgroups
    grid = min(shapes.blocks, pl.cdiv(shapes.panels, groups))
    steps = pl.cdiv(shapes.panels, grid * groups)

    def fft_conv_outer_stage(sequence, gate, matrix, out, scratch):
        group = lax.axis_index("warpgroup")
        barriers = scratch["barriers"]

        def at(step):
            """(b, c, d, panel) of this warpgroup, and whether there is one. Neighbours in memory come at once."""
            number = (step * grid + lax.axis_index("block")) * groups + group
            row = number // PANELS
            place = row // (shapes.channels * shapes.features), lax.rem(row // shapes.features, shapes.channels)
            return *place, lax.rem(row, shapes.features), lax.rem(number, PANELS), number < shapes.panels

        def columns(panel):
            return pl.ds(pl.multiple_of(panel * TILE, TILE), TILE)

        def fetch(step):
            b, c, d, panel, work = at(step)
            slot = lax.rem(step, _PANEL_SLOTS)
            copies = [("panels", sequence, shapes.sequences, shapes.tiles_in)]
            if shapes.gates:
                copies.append(("gates", gate, shapes.gates, shapes.gate_tiles))

            @pl.when(work & (step < steps))
            def _():
                for name, source, channels, tiles in copies:
                    # TMA fills with zeros beyond the rows; Pallas checks no start that is not static.
                    for tile in range(tiles):
                        rows = pl.ds(pl.multiple_of(tile * N1 + 0 * step, N1), N1)
                        plgpu.copy_gmem_to_smem(
                            source.at[b, c if channels > 1 else 0, d, rows, columns(panel)],
                            scratch[name].at[group, slot, pl.ds(tile * N1, N1)],
                            barriers["panels"].at[group * _PANEL_SLOTS + slot],
                        )

        fetch(jnp.int32(0))

        @pl.when(group == 0)
        def _():
            for tile in range(shapes.tiles_out):
                plgpu.copy_gmem_to_smem(matrix.at[tile], scratch["matrix"].at[tile], barriers["matrix"])

        plgpu.barrier_wait(barriers["matrix"])

        @pl.loop(0, steps)
        def _(step):
            b, c, d, panel, work = at(step)
            slot = lax.rem(step, _PANEL_SLOTS)
            fetch(step + 1)

            def tile_of(name, tile):
                return scratch[name].at[group, slot, pl.ds(tile * N1, N1)]

            @pl.when(work)
            def _():
                plgpu.barrier_wait(barriers["panels"].at[group * _PANEL_SLOTS + slot])
                if shapes.gates and shapes.gate_in:
                    for tile in range(shapes.tiles_in):
                        x = tile_of("panels", tile)
                        x[...] = _gated(load(x), load(tile_of("gates", tile)), dtype)
                    plgpu.commit_smem()
                for tile in range(shapes.tiles_out):
                    (y,) = sums_of_products([(scratch["matrix"].at[tile], scratch["panels"].at[group, slot])])
                    if shapes.gates and not shapes.gate_in:
                        y = _gated(y, load(tile_of("gates", tile)), dtype)
                    slot_out = lax.rem(step * shapes.tiles_out + tile, _STAGING_SLOTS)
                    staging = scratch["staging"].at[group, slot_out]
                    plgpu.wait_smem_to_gmem(_STAGING_SLOTS - 1, wait_read_only=True)  # the last but one has left it
                    staging[...] = y.astype(dtype)
                    plgpu.commit_smem()
                    rows = pl.ds(pl.multiple_of(tile * N1 + 0 * step, N1), N1)
                    plgpu.copy_smem_to_gmem(staging, out.at[b, c, d, rows, columns(panel)])

        plgpu.wait_smem_to_gmem(0)

    rows_in = shapes.tiles_in * N1
    scratch = {
        "matrix": matrices((shapes.tiles_out, N1, rows_in), dtype, columns=TILE),
        "panels": matrices((groups, _PANEL_SLOTS, rows_in, TILE), dtype),
        "staging": matrices((groups, _STAGING_SLOTS, N1, TILE), dtype),
        "barriers": {
            "matrix": plgpu.Barrier(num_arrivals=shapes.tiles_out),
            "panels": plgpu.Barrier(
                num_arrivals=shapes.tiles_in + shapes.gate_tiles, num_barriers=groups * _PANEL_SLOTS
            ),
        },
    }
    if shapes.gates:
        scratch["gates"] = matrices((groups, _PANEL_SLOTS, shapes.gate_tiles * N1, TILE), dtype)
    return plgpu.kernel(
        fft_conv_outer_stage,
        out_type=shapes.result,
        scratch_types={"scratch": scratch},
        grid=(grid,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="warpgroup",
        # Only what a commit or a barrier orders is shared between threads.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
