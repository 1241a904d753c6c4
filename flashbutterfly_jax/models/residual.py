"""What the residual blocks of both APIs share."""

from typing import Literal, get_args

type Norm = Literal["layer", "batch"]
NORMS = get_args(Norm.__value__)

# PyTorch's defaults, under which the paper's models were trained. Flax has an epsilon of 1e-6 for layers and a momentum
# of 0.99 for batches; PyTorch's momentum of 0.1 weighs the new statistics, Flax's the old ones.
EPSILON = 1e-5
MOMENTUM = 0.9


def tied_axes(position_axes: int) -> tuple[int, ...]:
    """The axes over which tied dropout has one mask: those of positions, before the features.

    Example:
      >>> tied_axes(2)
      (-3, -2)
    """
    return tuple(range(-1 - position_axes, -1))
