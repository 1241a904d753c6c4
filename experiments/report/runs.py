"""Runs as the report reads them from their folders, whatever state these are in."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.report import selected
from experiments.common.workdir import Row

ABLATION = ("kernel_init", "squash_threshold", "smooth_width")


@dataclass(frozen=True)
class Run:
    """What a folder says of its run."""

    name: str
    """By which the page calls it."""

    folder: Path

    recipe: Row
    """The options, with the name of their class as `name`."""

    starts: list[Row]

    rows: list[Row]
    """Of the metrics, in their order."""

    problems: list[str] = field(default_factory=list)
    """What is wrong with the folder, or not finished, in sentences."""

    @property
    def steps(self) -> int:
        """Done so far."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def finished(self) -> bool:
        """Whether all steps are done and evaluated."""
        last = self.rows[-1] if self.rows else {}
        return last.get("step") == self.recipe.get("steps") and last.get("split") != "train"

    @property
    def score(self) -> str:
        """The measure that counts."""
        return "accuracy" if any("accuracy" in row for row in self.rows) else "loss"

    def scores(self) -> dict[str, Row]:
        """By split, the evaluation that counts: where validation was best, or the last one."""
        return selected(self.rows, self.score)

    def examples_per_second(self) -> float | None:
        """Of training, the median over the rows."""
        speeds = [row["timing"]["examples_per_second"] for row in self.rows if row["split"] == "train"]
        return float(np.median(speeds)) if speeds else None

    def memory(self) -> tuple[int | None, int | None]:
        """Bytes of one device: the most that the process held, and the plan of the compiled step; None if not known."""
        peaks = [row["timing"]["peak_bytes"] for row in self.rows if "peak_bytes" in row["timing"]]
        return max(peaks, default=None), self.last_start.get("step_bytes")

    @property
    def last_start(self) -> Row:
        return self.starts[-1] if self.starts else {}


def read(folder: Path, name: str | None = None) -> Run:
    """The run in a folder, with what is wrong with it as `problems`.

    Raises:
      ValueError: if it is no folder of a run at all, or its run.json cannot be read.
    """
    file = folder / "run.json"
    try:
        described = json.loads(file.read_text())
        recipe, starts = dict(described["recipe"]), [dict(start) for start in described["starts"]]
        if not isinstance(recipe["name"], str) or not isinstance(recipe["steps"], int):
            raise TypeError("its recipe has no name, or no number of steps")
    except OSError as error:
        raise ValueError(f"{folder} is no folder of a run: run.json cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe a run ({type(error).__name__}: {error}).") from error
    rows, problems = read_metrics(folder / "metrics.jsonl")
    run = Run(name or folder.name, folder, recipe, starts, rows, problems)
    if not run.finished:
        problems.append(f"unfinished: {run.steps:,} of {recipe['steps']:,} steps are in its metrics.")
    return run


def read_metrics(file: Path) -> tuple[list[Row], list[str]]:
    """The rows that can be read, and sentences about the others."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        return [], [f"{file.name} cannot be read ({error.strerror})."]
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        if (row := parsed(line)) is not None:
            rows.append(row)
        elif line and number == len(lines):
            bad.append(f"the last line of {file.name} is torn and left out.")
        elif line or number < len(lines):
            bad.append(f"line {number} of {file.name} is no row of metrics and left out.")
    return rows, bad


def parsed(line: bytes) -> Row | None:
    """A row with all that the report needs of one, or None."""
    try:
        row: Any = json.loads(line)
        numbers = [row["step"], row["epoch"], row["loss"], row["timing"]["seconds"]]
        if row["split"] == "train":
            numbers.append(row["timing"]["examples_per_second"])
        whole = all(isinstance(value, int | float) for value in numbers) and isinstance(row["split"], str)
    except (ValueError, KeyError, TypeError):
        return None
    return row if whole else None


def read_all(folders: list[Path]) -> tuple[list[Run], dict[Path, str]]:
    """The runs in folders and in the folders right below them, and why the others are left out.

    A sweep or a comparison is a folder of runs. Each run is named by its folder, with as much of the path as tells it
    from the others.
    """
    found: list[Run] = []
    left_out: dict[Path, str] = {}
    for folder in dict.fromkeys(place for given in folders for place in expanded(given)):
        try:
            found.append(read(folder))
        except ValueError as error:
            left_out[folder] = str(error)
    names = shortest_names([run.folder for run in found])
    return [Run(name, *fields_of(run)) for name, run in zip(names, found, strict=True)], left_out


def expanded(folder: Path) -> list[Path]:
    """The folder, or the runs in it if it is not one itself."""
    if (folder / "run.json").exists() or not folder.is_dir():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/run.json")) or [folder]


def shortest_names(folders: list[Path]) -> list[str]:
    """The last parts of each path, as many as make all of them different."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def fields_of(run: Run) -> tuple:
    return run.folder, run.recipe, run.starts, run.rows, run.problems
