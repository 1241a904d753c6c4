"""Which kernel runs: the factors of the transform, how many rows share a tile, how many warpgroups share a block."""

import dataclasses
import enum

N1 = 64
"""The first DFT factor: the rows of a tensor-core product on Hopper."""

TILE = 64
"""Columns of a tile: a warpgroup carries 64 x 64 complex points, 64 of its 128 registers as an accumulator."""

SHARED_MEMORY_BYTES = 227 * 1024
"""What one block may use on sm_90."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a fused convolution is cut up.

    Attributes:
      n2: the second DFT factor, 16, 32 or 64: the transform has 64 n2 points.
      warpgroups: in a block, each with its own tile.
      spectrum_slots: 2 to fetch the next spectrum of taps during the work with one, 1 to save shared memory.
      blocks: in the persistent grid; one for each multiprocessor is best.

    Raises:
      ValueError: for factors or sizes that no kernel has.
    """

    n2: int
    warpgroups: int = 4
    spectrum_slots: int = 2
    blocks: int = 132

    def __post_init__(self):
        if self.n2 not in (16, 32, 64):
            raise ValueError(f"n2 must be 16, 32 or 64; got {self.n2}.")
        if not 1 <= self.warpgroups <= 4:
            raise ValueError(f"warpgroups must be from 1 to 4; got {self.warpgroups}.")
        if self.spectrum_slots not in (1, 2):
            raise ValueError(f"spectrum_slots must be 1 or 2; got {self.spectrum_slots}.")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1; got {self.blocks}.")

    @property
    def points(self) -> int:
        """The transform's complex points; the longest sequence it convolves."""
        return N1 * self.n2

    @property
    def rows(self) -> int:
        """Rows of the batch side by side in a tile."""
        return TILE // self.n2


LONGEST = N1 * 64
"""The longest sequence that one tile holds."""


class Kernel(enum.Enum):
    """The kernels, each with configurations of its own: they differ in shared memory and in registers."""

    FORWARD = "forward"
    FORWARD_GATED = "forward, gated"
    FORWARD_CHANNELS = "forward, two channels"
    FORWARD_CHANNELS_GATED = "forward, two channels, gated"
    BACKWARD = "backward"


MAX_CHANNELS = 2
"""Channels whose spectra fit beside a tile: that many share one transform of u."""

# Of the configurations that compile without spills the fastest of 2 to 4 warpgroups on one H200 (jax 0.11.2, B = 64,
# D = 768, bfloat16).
CONFIGS: dict[Kernel, dict[int, Config]] = {
    Kernel.FORWARD: {16: Config(16, 4), 32: Config(32, 3), 64: Config(64, 4)},
    Kernel.FORWARD_GATED: {16: Config(16, 3, 1), 32: Config(32, 3, 1), 64: Config(64, 4, 1)},
    Kernel.FORWARD_CHANNELS: {16: Config(16, 2), 32: Config(32, 2), 64: Config(64, 3, 1)},
    Kernel.FORWARD_CHANNELS_GATED: {16: Config(16, 2, 1), 32: Config(32, 2, 1), 64: Config(64, 2, 1)},
    Kernel.BACKWARD: {16: Config(16, 2, 1), 32: Config(32, 2, 1), 64: Config(64, 2, 1)},
}


def second_factor(length: int) -> int:
    """n2 of the shortest transform that holds a sequence."""
    return next(n2 for n2 in (16, 32, 64) if length <= N1 * n2)


def forward_kernel(channels: int, gated: bool) -> Kernel:
    """The forward kernel for so many channels at once."""
    if channels == 1:
        return Kernel.FORWARD_GATED if gated else Kernel.FORWARD
    return Kernel.FORWARD_CHANNELS_GATED if gated else Kernel.FORWARD_CHANNELS
