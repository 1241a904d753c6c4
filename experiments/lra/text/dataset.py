"""The IMDB reviews on disk, as array records of tensorflow-datasets, and read from there one by one.

Training shuffles what it reads; the order of the rows is that of the archive.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.console import Console

from experiments.common.preparation import prepared, progress
from experiments.lra.text import archive
from experiments.lra.text.archive import Review
from experiments.lra.text.vocabulary import Vocabulary

NAME = "published"  # of the only configuration
CATALOG = Path(
    "imdb_reviews/plain_text/1.0.0"
)  # of tensorflow-datasets' own builder, which needs TensorFlow to prepare


class Rows(Protocol):
    """Reviews by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Review: ...


class Reviews(NamedTuple):
    """Both splits. The published test reviews are all there is to choose and to judge by."""

    train: Rows
    test: Rows


class Examples:
    """Reviews as examples for training: sequences of one length, each ended, cut where it does not fit, and padded."""

    def __init__(self, rows: Rows, vocabulary: Vocabulary, length: int) -> None:
        self._rows, self._vocabulary, self._length = rows, vocabulary, length

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        text, label = self._rows[row]
        tokens, count = self._vocabulary.sequence(text, self._length)
        return {"inputs": tokens, "lengths": count, "labels": np.int32(label)}


def prepare(data_dir: Path, console: Console) -> Path:
    """The folder of the prepared reviews, which are written if they are not there.

    An `imdb_reviews` that tensorflow-datasets has prepared in this folder is as good. Otherwise they come from
    `<data_dir>/aclImdb_v1.tar.gz`, which is downloaded, 84 MB, if it is not there.

    Raises:
      ValueError: if the archive cannot be had or is not the published one, or the folder cannot be written to.
    """
    if (data_dir / CATALOG).exists():
        return data_dir / CATALOG
    folder = data_dir / "imdb_text" / NAME / archive.VERSION
    return prepared(folder, lambda: _write(data_dir, console), console)


def read(folder: Path) -> Reviews:
    """The reviews of a folder that `prepare` has named: each is read once now, to check it, and when it is asked for.

    Raises:
      ValueError: if the folder is damaged, or not what it should be.
    """
    import tensorflow_datasets as tfds

    with _named(folder):
        source = tfds.builder_from_directory(folder)
        reviews = Reviews(*(_Stored(source.as_data_source(split), folder) for split in archive.SPLITS))
        for rows in reviews:
            for row in range(len(rows)):
                rows[row]
    return reviews


class _Stored:
    """Rows of a data source, checked."""

    def __init__(self, source: Any, folder: Path) -> None:
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Review:
        stored = self._source[row]
        label = int(stored["label"])
        if not 0 <= label < len(archive.LABELS):
            raise ValueError(f"{self._folder}, row {row}: expected the label 0 or 1; got {label}.")
        return Review(bytes(stored["text"]), label)


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Names the folder of whatever goes wrong inside."""
    try:
        yield
    except Exception as error:  # of every kind that array records and tensorflow-datasets know
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{folder} must be a whole dataset of IMDB reviews, but it cannot be read ({reason}). Remove that folder "
            "to have it prepared again."
        ) from error


def _write(data_dir: Path, console: Console) -> None:
    splits = archive.get(data_dir, console)

    from experiments.common import array_records
    from experiments.lra.text.builder import ImdbText

    console.print(f"writing {sum(map(len, splits.values())):,} reviews into {data_dir}", soft_wrap=True)
    with progress(console) as bars:
        rows = {
            split: (review._asdict() for review in bars.track(reviews, description=f"writing {split}"))
            for split, reviews in splits.items()
        }
        array_records.write(array_records.make(ImdbText, data_dir, NAME), rows)
