"""Configurations by rule: which ones a kernel can run with, and a fair one where none was measured.

Two things bound how many warpgroups share a block. Its 227 KB of shared memory hold the tables, the spectra of the
taps and each warpgroup's tiles; and its 65,536 registers leave a thread 128 with four warpgroups, 168 with three and
255, all that it can address, with two. A kernel that needs more keeps them in memory, and its products may wait for
one another: at 4096 steps those of the forward kernel do with three warpgroups, but not with four.
"""

import dataclasses
import itertools
import math

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.config import N1, SHARED_MEMORY_BYTES, TILE, Config, Kernel

_ITEMSIZE = 2
_BARRIERS_BYTES = 1024
_WARPGROUPS = 2
"""As many as have registers for every kernel. More can be faster, which only measuring tells."""


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a kernel keeps on chip.

    Attributes:
      tiles: real ones of 64 x 64 numbers, for each warpgroup; a complex one counts twice.
      channels: spectra of taps that are there at once.
    """

    tiles: int
    channels: int


# Tiles: u and the complex one that leaves (3); the gate's (+ 1); with two channels the spectrum of u too (+ 2); and
# going back u, g, the spectrum of u and the one that leaves (6), with both gates too (8).
DEMANDS = {
    Kernel.FORWARD: Demand(tiles=3, channels=1),
    Kernel.FORWARD_GATED: Demand(tiles=4, channels=1),
    Kernel.FORWARD_CHANNELS: Demand(tiles=5, channels=2),
    Kernel.FORWARD_CHANNELS_GATED: Demand(tiles=6, channels=2),
    Kernel.BACKWARD: Demand(tiles=6, channels=1),
    Kernel.BACKWARD_GATED: Demand(tiles=8, channels=1),
}


def shared_memory(kernel: Kernel, config: Config) -> int:
    """Bytes of a block's matrices in shared memory.

    Example:
      >>> shared_memory(Kernel.FORWARD, Config(16, warpgroups=4))
      145408
    """
    demand, n2 = DEMANDS[kernel], config.n2
    f1 = (2 if n2 == TILE else 4) * N1 * N1
    f2 = math.prod(column_dft.blocks_shape(n2)) if n2 in column_dft.POINTS else 2 * n2 * 2 * n2
    twiddle = 2 * N1 * n2
    spectra = config.spectrum_slots * demand.channels * 2 * N1 * n2
    tiles = config.warpgroups * demand.tiles * N1 * TILE
    return _ITEMSIZE * (f1 + f2 + twiddle + spectra + tiles)


def fits(kernel: Kernel, config: Config) -> bool:
    """Whether a block has shared memory for it."""
    return shared_memory(kernel, config) + _BARRIERS_BYTES <= SHARED_MEMORY_BYTES


def candidates(kernel: Kernel, n2: int, blocks: int = Config.blocks) -> list[Config]:
    """Every configuration that fits, most warpgroups first.

    Example:
      >>> [(config.warpgroups, config.spectrum_slots) for config in candidates(Kernel.BACKWARD, 64)]
      [(3, 2), (3, 1), (2, 2), (2, 1), (1, 2), (1, 1)]
    """
    every = (Config(n2, *choice, blocks) for choice in itertools.product((4, 3, 2, 1), (2, 1)))
    return [config for config in every if fits(kernel, config)]


def heuristic(kernel: Kernel, n2: int) -> Config:
    """A configuration for a kernel that was not measured: at most two warpgroups, then the second slot.

    Example:
      >>> heuristic(Kernel.FORWARD, 64)
      Config(n2=64, warpgroups=2, spectrum_slots=2, blocks=132)
    """
    return next(config for config in candidates(kernel, n2) if config.warpgroups <= _WARPGROUPS)
