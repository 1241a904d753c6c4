"""ListOps in memory, from a generated dataset or from the files that Long Range Arena released.

A generated dataset is a tensorflow-datasets folder of array records, which needs no TensorFlow. It is drawn once per
folder, seed, size and shape, and read back whole: 200 MB of tokens, padded, so that a batch is one indexing of numpy.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from experiments.common.preparation import prepared, progress
from experiments.lra.listops import trees, vocabulary
from experiments.lra.listops.trees import Row, Shape

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Sequences of one padded length; by its index, one of them as an example for training."""

    tokens: np.ndarray
    """uint8 (rows, length), each sequence with its end, padded on the right."""

    lengths: np.ndarray
    """int32 (rows,), of each with its end."""

    labels: np.ndarray
    """int32 (rows,), 0 to 9."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"inputs": self.tokens[row], "lengths": self.lengths[row], "labels": self.labels[row]}


class Listops(NamedTuple):
    """The three splits."""

    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Generated:
    """What decides the rows of a generated dataset, and its name.

    Attributes:
      seed: of the drawing.
      train_rows: expressions for training; the defaults are Long Range Arena's.
      validation_rows: expressions for choosing.
      test_rows: expressions for testing.
      shape: of the expressions.
    """

    seed: int = 0
    train_rows: int = 96_000
    validation_rows: int = 2_000
    test_rows: int = 2_000
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0; got {self.seed}.")
        for name, rows in zip(("train_rows", "validation_rows", "test_rows"), self.rows, strict=True):
            if rows < 1:
                raise ValueError(f"{name} must be at least 1; got {rows}.")

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of each split."""
        return self.train_rows, self.validation_rows, self.test_rows

    @property
    def spans(self) -> dict[str, slice]:
        """Where each split is among all rows."""
        ends = itertools.accumulate(self.rows)
        return {split: slice(end - rows, end) for split, rows, end in zip(SPLITS, self.rows, ends, strict=True)}

    @property
    def name(self) -> str:
        """Every choice, so that no other dataset can be taken for this one."""
        shape = self.shape
        return (
            f"seed{self.seed}-rows{'_'.join(map(str, self.rows))}-length{shape.min_length}to{shape.max_length}"
            f"-depth{shape.max_depth}-arguments{shape.max_arguments}"
        )

    def draw(self, workers: int = 1) -> Iterator[Row]:
        """The rows of all splits, one split after the other."""
        return itertools.islice(trees.rows(self.seed, self.shape, workers=workers), sum(self.rows))


def drawn(which: Generated, length: int, *, workers: int = 1) -> Listops:
    """A generated dataset without a folder: the rows that `prepare` would write, in memory alone."""
    rows = which.draw(workers)
    return Listops(*(pack(itertools.islice(rows, count), count, length) for count in which.rows))


def prepare(data_dir: Path, which: Generated, *, workers: int = 1, console: Console | None = None) -> Path:
    """Draws and writes a dataset unless it is there, and returns its folder, which is whole or not there.

    Raises:
      ValueError: if the folder cannot be made or written to, or there are fewer workers than 1.
    """
    folder = folder_of(data_dir, which)
    console = console or Console(quiet=True)
    rows = which.draw(workers)  # refuses a wrong number of workers before anything is written; draws nothing yet
    if not folder.exists() and any(data_dir.glob("basic_*.tsv")):
        raise ValueError(
            f"data_dir must be a folder for generated rows; got {data_dir}, which holds released files: give it as "
            "tsv_dir."
        )
    return prepared(folder, lambda: _write(data_dir, which, rows, console), console)


def read(data_dir: Path, which: Generated, length: int) -> Listops:
    """A dataset that `prepare` has written, padded or cut to this length.

    Raises:
      ValueError: if it is not there, or not whole, or not what its name says.
    """
    from experiments.lra.listops import builder

    folder = folder_of(data_dir, which)
    try:
        source = builder.make(data_dir, which.name)
        splits = [
            pack((Row(row["tokens"], int(row["value"])) for row in source.as_data_source(split)), rows, length)
            for split, rows in zip(SPLITS, which.rows, strict=True)
        ]
    except Exception as error:  # of every kind that array records and tensorflow-datasets know
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{folder} must be a whole ListOps dataset, but it cannot be read ({reason}). Remove that folder to have "
            "the dataset drawn again."
        ) from error
    return Listops(*splits)


def folder_of(data_dir: Path, which: Generated) -> Path:
    """Where tensorflow-datasets keeps a dataset: builder, configuration, version."""
    return data_dir / "listops" / which.name / trees.VERSION


def pack(rows: Iterable[Row], count: int, length: int) -> Split:
    """So many rows, each ended, cut where it does not fit, and padded to this length.

    Raises:
      ValueError: if there are more or fewer rows, or if one is not an expression.
    """
    split = Split(
        tokens=np.full((count, length), vocabulary.PAD, np.uint8),
        lengths=np.zeros(count, np.int32),
        labels=np.zeros(count, np.int32),
    )
    found = 0
    for found, (tokens, value) in enumerate(itertools.islice(rows, count + 1), start=1):
        if found > count:
            raise ValueError(f"expected {count} rows, got more")
        if not 0 <= value < vocabulary.DIGITS or len(tokens) == 0:
            raise ValueError(f"expected tokens and a value from 0 to 9 in row {found}, got {len(tokens)} and {value}")
        kept = min(len(tokens), length - 1)
        split.tokens[found - 1, :kept] = tokens[:kept]
        split.tokens[found - 1, kept] = vocabulary.END
        split.lengths[found - 1] = kept + 1
        split.labels[found - 1] = value
    if found < count:
        raise ValueError(f"expected {count} rows, got {found}")
    return split


def _write(data_dir: Path, which: Generated, rows: Iterator[Row], console: Console) -> None:
    from experiments.common import array_records
    from experiments.lra.listops import builder

    console.print(f"drawing {sum(which.rows):,} expressions into {folder_of(data_dir, which)}", soft_wrap=True)
    with progress(console) as bars:
        drawn = list(bars.track(rows, total=sum(which.rows), description="drawing"))
        features = {
            split: (row._asdict() for row in bars.track(drawn[span], description=f"writing {split}"))
            for split, span in which.spans.items()
        }
        array_records.write(builder.make(data_dir, which.name), features)
