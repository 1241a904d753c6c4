"""The data sets, by the names of their tasks.

To add one, write a `samples.Loader`, for example in a module `samples.py` beside the data set,

    def samples(data_dir: Path | None, count: int, seed: int) -> Texts: ...

and name it in `SAMPLES` as `"module:function"`. For its loader's speed add a function that gives training examples,
`(data_dir: Path | None, rows: int) -> Source`, to `SOURCES`, with the batch size of the paper's recipe. Modules are
imported when they are asked for, and only then.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from experiments.common.splits import Source
from experiments.data.samples import Loader

SAMPLES: Final[dict[str, str]] = {
    "listops": "experiments.data.own:listops",
    "text": "experiments.data.texts:text",
    "retrieval": "experiments.data.texts:retrieval",
    "image": "experiments.data.own:image",
    "scifar": "experiments.data.own:cifar",
    "cifar2d": "experiments.data.own:cifar",
    "pathfinder32": "experiments.data.own:pathfinder32",
    "pathx": "experiments.data.own:pathx",
    "path256": "experiments.data.own:path256",
    "fmri": "experiments.fmri.samples:samples",
}


class Loading(NamedTuple):
    """How to measure a loader.

    Attributes:
      source: `"module:function"`.
      batch_size: of the paper's recipe.
      rows: to draw, where rows are drawn; fewer where drawing is slow.
    """

    source: str
    batch_size: int
    rows: int


SOURCES: Final[dict[str, Loading]] = {
    "listops": Loading("experiments.data.own:listops_source", 50, 4000),
    "text": Loading("experiments.data.texts:text_source", 16, 500),
    "retrieval": Loading("experiments.data.texts:retrieval_source", 64, 500),
    "image": Loading("experiments.data.own:image_source", 50, 4000),
    "scifar": Loading("experiments.data.own:scifar_source", 50, 4000),
    "cifar2d": Loading("experiments.data.own:cifar2d_source", 50, 4000),
    "pathfinder32": Loading("experiments.data.own:pathfinder32_source", 64, 4000),
    "pathx": Loading("experiments.data.own:pathx_source", 16, 500),
    "path256": Loading("experiments.data.own:path256_source", 16, 500),
    "fmri": Loading("experiments.data.brain:source", 192, 40),
}


def loader(task: str) -> Loader:
    """What gives the samples of a task.

    Raises:
      ValueError: if there is no such task, naming those that there are, or if its module is not there.
    """
    if task not in SAMPLES:
        raise ValueError(f"task must be one of {', '.join(SAMPLES)}; got {task!r}.")
    return _imported(SAMPLES[task])


def source(task: str) -> Callable[[Path | None, int], Source]:
    """What gives the training examples of a task.

    Raises:
      ValueError: as for `loader`.
    """
    if task not in SOURCES:
        raise ValueError(f"task must be one of {', '.join(SOURCES)}; got {task!r}.")
    return _imported(SOURCES[task].source)


def _imported(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
