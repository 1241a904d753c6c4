"""Prepares Pathfinder: `python -m experiments.lra.pathfinder --help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from experiments.common.preparation import command
from experiments.lra.pathfinder import dataset
from experiments.lra.pathfinder.design import Design, Difficulty


@dataclass(frozen=True)
class Prepare:
    """Draw Pathfinder by the rules of Long Range Arena and write it for the training runs, which find it there.

    The defaults are the 160,000, 20,000 and 20,000 images of the benchmark. What is there already is left alone, and a
    training run prepares by itself what it does not find. The same options always give the same images.
    """

    size: Literal[32, 64, 128, 256] = 32
    """Of the images: 32 × 32 pixels are Pathfinder, 128 × 128 Path-X, 256 × 256 Path256."""

    difficulty: Difficulty = "curv_contour_length_14"
    """How long the curves are: 6, 9 or 14 dashes. The last one is that of the benchmark."""

    distractors: int | None = None
    """Shorter curves that each image should have; None is the published number, 5, 8 or 7 where curves are longest."""

    data_dir: Path = Path("data")
    """Where to write; it may hold other datasets, too."""

    workers: int = 1
    """Processes that draw. The images do not depend on it."""

    seed: int = 0
    """Of the drawing."""

    train_rows: int = 160_000
    """Images for training."""

    validation_rows: int = 20_000
    """Images for choosing."""

    test_rows: int = 20_000
    """Images for testing."""

    def which(self) -> dataset.Generated:
        """The dataset that the options describe."""
        design = Design(self.size, self.difficulty, self.distractors)
        return dataset.Generated(design, self.seed, self.train_rows, self.validation_rows, self.test_rows)


def prepare(options: Prepare, console: Console) -> tuple[Path, int]:
    which = options.which()
    folder = dataset.prepare(options.data_dir, which, workers=options.workers, console=console)
    return folder, sum(which.rows)


def main() -> None:
    command(Prepare, prepare, prog="python -m experiments.lra.pathfinder", rows="images")


if __name__ == "__main__":
    main()
