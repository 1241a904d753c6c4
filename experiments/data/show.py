"""Draws samples of a data set with their labels: `python -m experiments.data.show --help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from experiments.common.workdir import write_whole
from experiments.data import figures, registry

type Task = Literal[
    "listops", "text", "retrieval", "image", "scifar", "cifar2d", "pathfinder32", "pathx", "path256", "fmri"
]


@dataclass(frozen=True)
class Show:
    """Draw samples of a data set with their labels into a PNG file.

    Sets that are generated need no preparation. Of the others samples are made up, and the picture says so, unless the
    folder of the real ones is given.
    """

    task: Task
    """Whose data set."""

    out: Path | None = None
    """The file; the default is reports/data/TASK.png."""

    data_dir: Path | None = None
    """Folder of the data set."""

    count: int = 16
    """Samples."""

    seed: int = 0
    """Which samples."""


def show(options: Show, console: Console) -> Path:
    """The file, once it is written.

    Raises:
      ValueError: for options that cannot be, or a data set that cannot be read.
    """
    if not 1 <= options.count <= 100:
        raise ValueError(f"count must be from 1 to 100; got {options.count}.")
    if options.seed < 0:
        raise ValueError(f"seed must be at least 0; got {options.seed}.")
    samples = registry.loader(options.task)(options.data_dir, options.count, options.seed)
    out = options.out or Path("reports/data") / f"{options.task}.png"
    picture = figures.draw(samples, options.task)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, picture)
    except OSError as error:
        raise ValueError(f"out must be a file that can be written; got {out} ({error.strerror or error}).") from error
    console.print(f"{len(samples.labels)} samples of {options.task} are in {out}", soft_wrap=True)
    return out


def main() -> None:
    try:
        show(tyro.cli(Show, prog="python -m experiments.data.show"), Console())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
