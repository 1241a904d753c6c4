"""Published figures, each with a tag that says where it comes from: what published.json holds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.workdir import Row

FILE = Path(__file__).parent / "published.json"
UNCONFIRMED = "R"


@dataclass(frozen=True)
class Figure:
    """A score that somebody published."""

    model: str

    score: float | None
    """None where the model did not learn the task."""

    tag: str

    source: str = ""
    """More about where it comes from."""

    kernel_init: str = ""

    regularization: str = ""

    @property
    def label(self) -> str:
        """The model, and of long convolutions the kernels."""
        kernels = ", ".join(filter(None, [self.kernel_init.replace("_", " "), self.regularization]))
        return f"{self.model} ({kernels})" if kernels else self.model

    def value(self, unit: str) -> str:
        """The score with its tag."""
        score = "did not learn" if self.score is None else f"{self.score:g} {unit}".strip()
        note = ", recalled, unconfirmed" if self.tag == UNCONFIRMED else ""
        return f"{score} [{self.tag}{note}]"


@dataclass(frozen=True)
class Benchmark:
    """A task, and what is published about it."""

    title: str

    recipe: Mapping[str, Any]
    """Options, and the name of their class, by which runs of the task are known."""

    score: str

    unit: str

    published: tuple[Figure, ...]

    def covers(self, recipe: Row) -> bool:
        """Whether a run is one of this task."""
        return all(recipe.get(name) == value for name, value in self.recipe.items())


@dataclass(frozen=True)
class Speed:
    """How many times faster than something a model was published to train."""

    what: str
    model: str
    factor: float
    tag: str


def tags() -> dict[str, str]:
    """What each tag means."""
    return dict(json.loads(FILE.read_text())["tags"])


def benchmarks() -> list[Benchmark]:
    """All tasks of the file."""
    return [
        Benchmark(**(task | {"published": tuple(Figure(**figure) for figure in task["published"])}))
        for task in json.loads(FILE.read_text())["tasks"]
    ]


def speeds() -> list[Speed]:
    """All ratios of speed of the file."""
    return [Speed(**entry) for entry in json.loads(FILE.read_text())["speed"]]
