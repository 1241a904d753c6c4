"""Prepares the IMDB reviews: `python -m experiments.lra.text --help`."""

import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

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


def main() -> None:
    options, console = tyro.cli(Prepare, prog="python -m experiments.lra.text"), Console()
    start = time.perf_counter()
    try:
        reviews = dataset.read(folder := dataset.prepare(options.data_dir, console))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run the same command again to start over.") from None
    console.print(
        f"{sum(map(len, reviews)):,} reviews are in {folder} ({time.perf_counter() - start:.0f} s)", soft_wrap=True
    )


if __name__ == "__main__":
    main()
