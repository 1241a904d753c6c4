"""A few samples of a data set, with their labels, in one of three forms, each of which has its picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Samples:
    """What every form has.

    Attributes:
      source: where they come from, for the picture's title: a file, a generator with its seed, or a stand-in.
      labels: of each sample.
    """

    source: str
    labels: Sequence[str]


@dataclass(frozen=True)
class Pictures(Samples):
    """Attributes: images: uint8 (samples, height, width), or (samples, height, width, 3) in colour."""

    images: np.ndarray


@dataclass(frozen=True)
class Texts(Samples):
    """Attributes: texts: of each sample; long ones are cut in the picture."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Series(Samples):
    """Attributes:
    values: of each sample, float (times, channels).
    seconds: between two times of each sample.
    """

    values: Sequence[np.ndarray]
    seconds: Sequence[float]


type Loader = Callable[[Path | None, int, int], Samples]
"""Of a data directory, a number of samples and a seed: as many samples. Without a directory they are generated, or made
up where the data set is not one that is generated; then `source` must say so."""
