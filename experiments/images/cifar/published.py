"""The binary version of CIFAR-10 as its author publishes it.

A batch is 10,000 records of 3,073 bytes: a label, 0 to 9, and the red, the green and the blue values of 32 × 32 pixels,
row by row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from rich.console import Console

from experiments.common import archives, downloads
from experiments.common.downloads import Download

CLASSES: Final = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE: Final = 32
ARCHIVE: Final = Download(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
FOLDER: Final = "cifar-10-batches-bin"
TRAIN_BATCHES: Final = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_BATCH: Final = "test_batch.bin"
ROWS_OF_A_BATCH: Final = 10_000
_RECORD: Final = 1 + 3 * SIDE**2


class Images(NamedTuple):
    """Labelled photographs.

    Attributes:
      pixels: uint8 (rows, 32, 32, 3).
      labels: int32 (rows,), 0 to 9, places in `CLASSES`.
    """

    pixels: np.ndarray
    labels: np.ndarray


def read(data_dir: Path, *, console: Console | None = None) -> tuple[Images, Images]:
    """The 50,000 training and the 10,000 test images.

    They come from the first of these that there is: the folder `data_dir/cifar-10-batches-bin`, which is the unpacked
    archive with its six batches; `data_dir/cifar-10-binary.tar.gz`, which must be the published file; the same,
    downloaded to there, 170 MB.

    Raises:
      ValueError: naming the file, if it is missing and cannot be downloaded, or is not as it should be.
    """
    folder = data_dir / FOLDER
    if folder.is_dir():
        return _train_and_test(_unpacked(folder), folder)
    archive = downloads.obtain(ARCHIVE, data_dir, console)
    return _train_and_test(_packed(archive), archive)


def parse(content: bytes, name: str) -> Images:
    """The images of a batch's bytes.

    Raises:
      ValueError: naming the file, if it is truncated, or for the first label that is out of range.
    """
    expected = ROWS_OF_A_BATCH * _RECORD
    if len(content) != expected:
        problem = "truncated" if len(content) < expected else "too long"
        raise ValueError(
            f"{name} must have {ROWS_OF_A_BATCH:,} records of {_RECORD:,} bytes; got {len(content):,} bytes: it is "
            f"{problem}."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    labels = records[:, 0].astype(np.int32)
    wrong = np.flatnonzero(labels >= len(CLASSES))
    if len(wrong):
        raise ValueError(
            f"{name}, record {wrong[0] + 1}: the label must be from 0 to {len(CLASSES) - 1}; got {labels[wrong[0]]}."
        )
    pixels = records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return Images(np.ascontiguousarray(pixels), labels)


def _packed(archive: Path) -> dict[str, bytes]:
    wanted = {f"{FOLDER}/{name}" for name in (*TRAIN_BATCHES, TEST_BATCH)}
    largest = ROWS_OF_A_BATCH * _RECORD
    return {
        Path(name).name: content for name, content in archives.members(archive, wanted.__contains__, largest=largest)
    }


def _unpacked(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in (*TRAIN_BATCHES, TEST_BATCH):
        try:
            found[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(f"{folder / name} must be readable; got {error.strerror or error}.") from error
    return found


def _train_and_test(batches: Mapping[str, bytes], where: Path) -> tuple[Images, Images]:
    missing = [name for name in (*TRAIN_BATCHES, TEST_BATCH) if name not in batches]
    if missing:
        raise ValueError(
            f"{where} must hold {', '.join(TRAIN_BATCHES)} and {TEST_BATCH}, those of the binary version of CIFAR-10 "
            f"({ARCHIVE.url}); it lacks {', '.join(missing)}."
        )
    train = [parse(batches[name], f"{where / name}") for name in TRAIN_BATCHES]
    pixels, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Images(pixels, labels), parse(batches[TEST_BATCH], f"{where / TEST_BATCH}")
