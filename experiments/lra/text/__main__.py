"""Prepares the IMDB reviews: `python -m experiments.lra.text --help`."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments.common.preparation import command
from experiments.lra.text import dataset


@dataclass(frozen=True)
class Prepare:
    """Get the IMDB reviews and write them for the training runs, which find them there.

    The archive aclImdb_v1.tar.gz, 84 MB, is downloaded from its authors unless a copy of yours lies in the folder; it
    is checked in any case. What is there already is left alone, and a training run prepares by itself what it does not
    find.
    """

    data_dir: Path = Path("data")
    """Where to write; it may hold other datasets, too."""


def prepare(options: Prepare, console: Console) -> tuple[Path, int]:
    folder = dataset.prepare(options.data_dir, console)
    return folder, sum(map(len, dataset.read(folder)))


def main() -> None:
    command(Prepare, prepare, prog="python -m experiments.lra.text", rows="reviews")


if __name__ == "__main__":
    main()
