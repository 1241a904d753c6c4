"""How the state of a run lies on the devices: a copy on each, or each array divided over all of them."""

from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

type StateSharding = Literal["replicated", "sharded"]

SMALL = 1 << 12  # numbers: smaller arrays are cheaper to keep than to gather


def state_shardings(shapes: Any, mesh: Mesh, kind: StateSharding) -> Any:
    """The sharding of each array of a state, in a tree like its own.

    Sharded, an array lies divided along the first axis that the devices divide, and a small one, or one without such
    an axis, everywhere. Parameters, their gradients and the moments of the optimizer have the same shapes, and so the
    same places: a device updates its own part, and the parameters are gathered for the computation alone.
    """

    def place(leaf: Any) -> NamedSharding:
        spec = P() if kind == "replicated" else divided(leaf.shape, mesh.size)
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, shapes)


def divided(shape: tuple[int, ...], devices: int) -> P:
    """The first axis over the devices that they divide.

    >>> divided((257, 512), 8), divided((512,), 8), divided((129, 63), 8)
    (PartitionSpec(None, 'data'), PartitionSpec(), PartitionSpec())
    """
    size = 1
    for length in shape:
        size *= length
    if size < SMALL:
        return P()
    for axis, length in enumerate(shape):
        if length % devices == 0:
            return P(*[None] * axis, "data")
    return P()
