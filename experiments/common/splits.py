"""The three parts of a dataset, and the division into them that published code makes with PyTorch."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Source(Protocol):
    """Examples by their number: what `grain.MapDataset.source` takes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Numpy arrays of the same shapes and dtypes for every example: `inputs`, `labels` and maybe `lengths`."""


class Splits(NamedTuple):
    """To learn from, to choose by, and to be judged by."""

    train: Source
    validation: Source
    test: Source


def random_split(sizes: Sequence[int], *, seed: int = 42) -> list[np.ndarray]:
    """Row numbers of parts of these sizes: those of `torch.utils.data.random_split` with a generator of this seed.

    The S4 repository and its descendants divide CIFAR-10 and Pathfinder so, with seed 42. PyTorch's permutation on the
    CPU swaps place i with place `i + r % (n - i)`, where r are the 32-bit numbers of a Mersenne Twister with the
    classical seeding, which is numpy's `RandomState`.

    Returns:
      An int64 array for each part.

    >>> [part.tolist() for part in random_split([7, 3])]
    [[2, 6, 1, 8, 4, 5, 0], [9, 3, 7]]
    """
    rows = sum(sizes)
    draws = np.random.RandomState(seed).randint(0, 2**32, max(rows - 1, 0), np.uint32).tolist()  # type: ignore[arg-type]
    order = list(range(rows))
    for i, drawn in enumerate(draws):
        j = i + drawn % (rows - i)
        order[i], order[j] = order[j], order[i]
    return np.split(np.array(order, np.int64), np.cumsum(sizes)[:-1])
