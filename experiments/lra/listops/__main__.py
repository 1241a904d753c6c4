"""Prepares ListOps: `python -m experiments.lra.listops --help`."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments.common.preparation import command
from experiments.lra.listops import dataset
from experiments.lra.listops.trees import Shape


@dataclass(frozen=True)
class Prepare:
    """Draw ListOps by the rules of Long Range Arena and write it for the training runs, which find it there.

    The defaults are the 96,000, 2,000 and 2,000 expressions of the benchmark, 65 MB: about 10 seconds on one CPU core.
    What is there already is left alone, and a training run prepares by itself what it does not find. The same options
    always give the same rows.
    """

    data_dir: Path = Path("data")
    """Where to write; it may hold other datasets, too."""

    workers: int = 1
    """Processes that draw. The rows do not depend on it."""

    seed: int = 0
    """Of the drawing."""

    train_rows: int = 96_000
    """Expressions for training."""

    validation_rows: int = 2_000
    """Expressions for choosing."""

    test_rows: int = 2_000
    """Expressions for testing."""

    min_length: int = 501
    """Fewest tokens of an expression, without the one that will end it."""

    max_length: int = 1999
    """Most tokens, likewise."""

    def which(self) -> dataset.Generated:
        """The dataset that the options describe."""
        shape = Shape(min_length=self.min_length, max_length=self.max_length)
        return dataset.Generated(self.seed, self.train_rows, self.validation_rows, self.test_rows, shape)


def prepare(options: Prepare, console: Console) -> tuple[Path, int]:
    which = options.which()
    folder = dataset.prepare(options.data_dir, which, workers=options.workers, console=console)
    return folder, sum(which.rows)


def main() -> None:
    command(Prepare, prepare, prog="python -m experiments.lra.listops", rows="rows")


if __name__ == "__main__":
    main()
