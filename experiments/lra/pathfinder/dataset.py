"""Pathfinder as examples for training: generated images, or those that Long Range Arena released.

Either are a tensorflow-datasets folder of array records, which needs no TensorFlow, written once. Small sets are read
back whole, so that a batch is one indexing of numpy; of large ones, each image when it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.common.preparation import prepared, progress
from experiments.common.splits import Source, Splits
from experiments.lra.pathfinder import images
from experiments.lra.pathfinder.design import Design
from experiments.lra.pathfinder.images import Row

NAMES: Final = ("train", "validation", "test")
IN_MEMORY: Final = 2**30  # bytes of pixels of all splits together


@dataclass(frozen=True)
class Generated:
    """What decides the rows of a generated dataset, and its name.

    Attributes:
      design: size and difficulty of the images.
      seed: of the drawing.
      train_rows: images for training; the defaults are Long Range Arena's 200,000, divided as there.
      validation_rows: images for choosing.
      test_rows: images for testing.
    """

    design: Design = field(default_factory=Design)
    seed: int = 0
    train_rows: int = 160_000
    validation_rows: int = 20_000
    test_rows: int = 20_000

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
    def name(self) -> str:
        """Every choice, so that no other dataset can be taken for this one."""
        return f"{self.design.name}-seed{self.seed}-rows{'_'.join(map(str, self.rows))}"

    def draw(self, split: int, workers: int = 1) -> Iterator[Row]:
        """The rows of a split, by its number. Those of one split do not depend on how many another one has."""
        return islice(images.rows(self.seed, self.design, stream=split, workers=workers), self.rows[split])


@dataclass(frozen=True)
class Images:
    """Images in memory; by its index, one of them as an example for training."""

    pixels: np.ndarray
    """uint8 (rows, size, size)."""

    labels: np.ndarray
    """int32 (rows,), 0 or 1."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"inputs": self.pixels[row].reshape(-1, 1), "labels": self.labels[row]}


@dataclass(frozen=True)
class Records:
    """Images on disk, each read when it is asked for."""

    source: Sequence[dict[str, Any]]
    """Of tensorflow-datasets."""

    folder: Path
    """Where they are."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        try:
            found = self.source[row]
            image, label = np.asarray(found["image"]), np.int32(found["label"])
        except Exception as error:  # of every kind that array records and tensorflow-datasets know
            raise _unreadable(self.folder, error) from error
        return {"inputs": image.reshape(-1, 1), "labels": np.asarray(label)}


def splits(
    which: Generated | None = None,
    *,
    data_dir: Path | None = Path("data"),
    workers: int = 1,
    console: Console | None = None,
) -> Splits:
    """The training, validation and test images of a generated dataset.

    Args:
      which: the dataset; for example `Generated(Design(128))` for Path-X and `Generated(Design(256))` for Path256. The
        default is Pathfinder 32.
      data_dir: where it is, or is written if it is missing. None draws it into memory, at each call.
      workers: processes that draw. The images do not depend on it.
      console: for progress.

    Returns:
      Splits for `grain.MapDataset.source`, of examples `{"inputs": uint8 (size², 1), "labels": int32 ()}`, pixels row
      by row. Give a batch of inputs to `normalize` before the model sees it. For the released images see
      `released.splits`, which gives the same.

    Raises:
      ValueError: if `data_dir` cannot be written to or what is there cannot be read. It names the folder.

    >>> train, validation, test = splits(Generated(train_rows=6, validation_rows=2, test_rows=2), data_dir=None)
    >>> len(train), train[0]["inputs"].shape, train[0]["inputs"].dtype
    (6, (1024, 1), dtype('uint8'))
    """
    which = which or Generated()
    if data_dir is None:
        return drawn(which, workers=workers)
    prepare(data_dir, which, workers=workers, console=console)
    return read(data_dir, which.design.size, which.name, which.rows)


def normalize(inputs: jax.Array) -> jax.Array:
    """Pixels from 0 to 255 as float32 from -1 to 1.

    For use inside of `jit`, for example in a task's `forward`:

        lambda model, batch, deterministic: model(normalize(batch["inputs"]), deterministic=deterministic)

    >>> normalize(jnp.array([0, 255], jnp.uint8)).tolist()
    [-1.0, 1.0]
    """
    return inputs.astype(jnp.float32) / 127.5 - 1


def drawn(which: Generated, *, workers: int = 1) -> Splits:
    """A generated dataset without a folder: the rows that `prepare` would write, in memory alone."""
    return Splits(*(_packed(which.draw(split, workers), rows, which) for split, rows in enumerate(which.rows)))


def prepare(data_dir: Path, which: Generated, *, workers: int = 1, console: Console | None = None) -> Path:
    """Draws and writes a dataset unless it is there, and returns its folder, which is whole or not there.

    Raises:
      ValueError: if the folder cannot be made or written to, or there are fewer workers than 1.
    """
    rows = {
        name: which.draw(split, workers) for split, name in enumerate(NAMES)
    }  # checks the workers; draws nothing yet
    message = f"drawing {sum(which.rows):,} images of {which.design.size} × {which.design.size} pixels"
    return write(data_dir, which.design.size, which.name, lambda: rows, which.rows, message, console)


def write(
    data_dir: Path,
    size: int,
    name: str,
    rows: Callable[[], dict[str, Iterator[Row]]],
    counts: Sequence[int],
    message: str,
    console: Console | None,
) -> Path:
    """Writes the rows of the splits as a dataset of this name unless it is there, and returns its folder."""
    from experiments.common import array_records
    from experiments.lra.pathfinder import builder

    folder = folder_of(data_dir, size, name)
    console = console or Console(quiet=True)

    def write_now() -> None:
        console.print(f"{message} into {folder}", soft_wrap=True)
        with progress(console) as bars:
            features = {
                split: ({"image": row.image, "label": row.label} for row in bars.track(some, count, description=split))
                for (split, some), count in zip(rows().items(), counts, strict=True)
            }
            array_records.write(builder.make(data_dir, size, name), features)

    return prepared(folder, write_now, console)


def read(data_dir: Path, size: int, name: str, counts: Sequence[int] | None = None) -> Splits:
    """A dataset that `write` has written: in memory, unless it is large.

    Args:
      data_dir: as for `write`.
      size: of the images.
      name: of the dataset.
      counts: of the rows that each split must have; None is any number.

    Raises:
      ValueError: if it is not there, or not whole, or not what its name says.
    """
    stored = records(data_dir, size, name)
    for split, some, count in zip(NAMES, stored, counts or map(len, stored), strict=True):
        if len(some) != count:
            raise _unreadable(folder_of(data_dir, size, name), f"expected {count} rows of {split}, got {len(some)}")
    if sum(map(len, stored)) * size**2 > IN_MEMORY:
        return stored
    return Splits(*(_loaded(some, size) for some in stored))


def records(data_dir: Path, size: int, name: str) -> Splits:
    """The same, not in memory in any case.

    Raises:
      ValueError: if it is not there, or not whole as far as its first and last rows tell.
    """
    from experiments.lra.pathfinder import builder

    folder = folder_of(data_dir, size, name)
    try:
        source = builder.make(data_dir, size, name)
        splits = Splits(*(Records(source.as_data_source(split), folder) for split in NAMES))
    except Exception as error:  # of every kind that array records and tensorflow-datasets know
        raise _unreadable(folder, error) from error
    for some in splits:
        some[0], some[len(some) - 1]
    return splits


def folder_of(data_dir: Path, size: int, name: str) -> Path:
    """Where tensorflow-datasets keeps a dataset: builder, configuration, version."""
    return data_dir / f"pathfinder{size}" / name / images.VERSION


def _packed(rows: Iterator[Row], count: int, which: Generated) -> Images:
    size = which.design.size
    pixels, labels = np.empty((count, size, size), np.uint8), np.empty(count, np.int32)
    for number, row in enumerate(rows):
        pixels[number], labels[number] = row
    return Images(pixels, labels)


def _loaded(stored: Source, size: int) -> Images:
    pixels, labels = np.empty((len(stored), size, size), np.uint8), np.empty(len(stored), np.int32)
    for row in range(len(stored)):
        example = stored[row]
        pixels[row], labels[row] = example["inputs"].reshape(size, size), example["labels"]
    return Images(pixels, labels)


def _unreadable(folder: Path, error: Exception | str) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(
        f"{folder} must be a whole Pathfinder dataset, but it cannot be read ({reason}). Remove that folder to have "
        "the dataset written again."
    )
