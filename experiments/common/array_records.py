"""Array records by tensorflow-datasets without TensorFlow. Imported where data is written or read, and only there."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import tensorflow_datasets as tfds
from absl import logging


class Builder(tfds.core.GeneratorBasedBuilder):
    """Writes rows that are given to it, in their order. A dataset adds `VERSION` and `_info`.

    The configuration's name is the dataset's: tensorflow-datasets finds data by it, and by nothing else. So it must say
    every choice that the rows depend on.
    """

    rows: Mapping[str, Iterable[Mapping[str, Any]]] | None = None
    """Of each split, by name, the features of its rows. For `write` alone."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Mapping[str, Any]]]]:
        assert self.rows is not None, "rows must be set before preparation"
        return {split: self._generate_examples(rows) for split, rows in self.rows.items()}

    def _generate_examples(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        yield from enumerate(rows)

    # Both print on standard output, about downloads that there are none of.
    def _log_download_bytes(self) -> None: ...

    def _log_download_done(self) -> None: ...


def make[B: Builder](kind: Callable[..., B], data_dir: Path, name: str) -> B:
    """The builder of the dataset of this name. From here on tensorflow-datasets shows no progress bars."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # no warning that the configuration is not one of a list
    try:
        return kind(data_dir=data_dir, config=tfds.core.BuilderConfig(name=name))
    finally:
        logging.set_verbosity(verbosity)


def write(builder: Builder, rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Writes the splits, one after the other. A split may have 1 GB of encoded rows, which wait in memory.

    Raises:
      OSError: if the disk is full. Nothing is left behind then.
    """
    builder.rows = rows
    try:
        with tempfile.TemporaryDirectory() as unused:  # by default it would be a folder in data_dir
            cast(Any, builder).download_and_prepare(file_format="array_record", download_dir=unused)
    except RuntimeError as error:  # what the writer of array records makes of a full disk
        raise OSError(" ".join(str(error).split())) from error
