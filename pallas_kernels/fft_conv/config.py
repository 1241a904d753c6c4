"""What there is to choose: kernels, factors of the transform, warpgroups that share a block; `tuned` chooses."""

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


BLOCK = N1 * TILE
"""The longest sequence that one tile holds, and the steps of a block of a longer one."""

MAX_BLOCKS = 4
"""Blocks of the longest sequence: as many spectra fit beside the tables and a share of those of the taps."""

LONGEST_ON_CHIP = MAX_BLOCKS * BLOCK
"""The longest sequence that every mode and direction convolves in one launch."""


class Kernel(enum.Enum):
    """The kernels, each with configurations of its own: they differ in shared memory and in registers."""

    FORWARD = "forward"
    FORWARD_GATED = "forward, gated"
    FORWARD_CHANNELS = "forward, two channels"
    FORWARD_CHANNELS_GATED = "forward, two channels, gated"
    BACKWARD = "backward"
    BACKWARD_GATED = "backward, gated"


MAX_CHANNELS = 2
"""Channels whose spectra fit beside a tile: that many share one transform of u."""


def second_factor(length: int) -> int:
    """n2 of the shortest transform that holds a sequence, or a block of a longer one."""
    return next((n2 for n2 in (16, 32) if length <= N1 * n2), TILE)


def forward_kernel(channels: int, gated: bool) -> Kernel:
    """The forward kernel for so many channels at once."""
    if channels == 1:
        return Kernel.FORWARD_GATED if gated else Kernel.FORWARD
    return Kernel.FORWARD_CHANNELS_GATED if gated else Kernel.FORWARD_CHANNELS
