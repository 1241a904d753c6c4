"""The Pathfinder images that Long Range Arena released: its archive `lra_release.gz`, or what is unpacked from it.

In `pathfinder32`, `pathfinder64`, `pathfinder128` and `pathfinder256` there is a folder for each difficulty, with the
images in `imgs/<batch>/sample_<number>.png` and a table for each batch, `metadata/<batch>.npy`. In spite of its name a
table is text, an image to a line: its folder, its name, its number, its label and what it was made with. The authors'
own program saves the same fields as an array of strings, which is read, too.
"""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console

from experiments.common import archives
from experiments.common.splits import Splits, random_split
from experiments.lra.pathfinder import dataset
from experiments.lra.pathfinder.design import CONTOUR_LENGTHS, GEOMETRIES, Difficulty
from experiments.lra.pathfinder.images import Row

_LABELS = {"0": 0, "1": 1}


class Entry(NamedTuple):
    """An image of a table: its path below the folder of the difficulty, and its label."""

    path: str
    label: int


def splits(
    release: Path,
    size: int = 32,
    difficulty: Difficulty = "curv_contour_length_14",
    *,
    data_dir: Path = Path("data"),
    console: Console | None = None,
) -> Splits:
    """The released training, validation and test images: 80, 10 and 10 %.

    They are divided as in the S4 repository and by the long convolutions' authors, with PyTorch and seed 42: see
    `random_split`. The release itself does not divide them.

    Args:
      release: `lra_release.gz`; or a folder with `pathfinder32` and so on in it, which is `lra_release/lra_release` of
        the unpacked archive.
      size: 32, 64, 128 or 256.
      difficulty: which of the three folders.
      data_dir: where all images are written as array records, once, after each was looked at.
      console: for progress, and for what was left out.

    Returns:
      Splits as those of `dataset.splits`.

    Raises:
      ValueError: naming the file, if something is missing or not as it should be. Only empty images are left out, and
        the console told; the release has one, `pathfinder32/curv_baseline/imgs/0/sample_172.png`.
    """
    if size not in GEOMETRIES:
        raise ValueError(f"size must be {', '.join(map(str, GEOMETRIES))}; got {size}.")
    if difficulty not in CONTOUR_LENGTHS:
        raise ValueError(f"difficulty must be one of {', '.join(CONTOUR_LENGTHS)}; got {difficulty!r}.")
    console = console or Console(quiet=True)
    files = _Folder(release, size, difficulty) if release.is_dir() else _Archive(release, size, difficulty)
    name = f"released-{difficulty}-{files.digest()}"
    if not dataset.folder_of(data_dir, size, name).exists():
        files.open()
        entries = _entries(files, console)
        sizes = (len(entries) - 2 * (len(entries) // 10), len(entries) // 10, len(entries) // 10)
        if min(sizes) < 1:
            raise ValueError(f"{files.where} must have at least 10 images; got {len(entries)}.")
        parts = random_split(sizes)

        def rows() -> dict[str, Iterator[Row]]:
            return {
                split: _rows(files, [entries[number] for number in numbers], size)
                for split, numbers in zip(dataset.NAMES, parts, strict=True)
            }

        message = f"reading {len(entries):,} images of {size} × {size} pixels from {files.where}, and writing them"
        dataset.write(data_dir, size, name, rows, sizes, message, console)
    return dataset.read(data_dir, size, name)


class _Files(ABC):
    """The files of one size and difficulty, by their paths below its folder."""

    where: str

    @abstractmethod
    def digest(self) -> str:
        """What tells this release from another one."""

    @abstractmethod
    def open(self) -> None:
        """To be called before the following."""

    @abstractmethod
    def tables(self) -> list[str]:
        """The paths of all tables."""

    @abstractmethod
    def size(self, path: str) -> int:
        """In bytes. Raises FileNotFoundError."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The content."""

    def name(self, path: str) -> str:
        """For the user."""
        return f"{self.where}/{path}"


class _Folder(_Files):
    def __init__(self, release: Path, size: int, difficulty: str) -> None:
        self.folder = release / f"pathfinder{size}" / difficulty
        self.where = f"{self.folder}"
        if not (self.folder / "metadata").is_dir():
            raise ValueError(
                f"release must be lra_release.gz, or a folder with pathfinder{size}/{difficulty}/metadata and "
                f"pathfinder{size}/{difficulty}/imgs in it, such as lra_release/lra_release of the archive; got "
                f"{release}, where {self.folder / 'metadata'} is missing."
            )

    def digest(self) -> str:
        content = hashlib.blake2b(digest_size=6)
        for path in self.tables():
            content.update(path.encode() + self.read(path))
        return content.hexdigest()

    def open(self) -> None: ...

    def tables(self) -> list[str]:
        return [f"metadata/{path.name}" for path in sorted((self.folder / "metadata").glob("*.npy"))]

    def size(self, path: str) -> int:
        return (self.folder / path).stat().st_size

    def read(self, path: str) -> bytes:
        try:
            return (self.folder / path).read_bytes()
        except OSError as error:
            raise ValueError(f"{self.folder / path} must be readable; got {error.strerror or error}.") from error


class _Archive(_Files):
    """Its files of one size and difficulty are held in memory: 100 MB for 32 pixels, 0.6 GB for 256."""

    def __init__(self, release: Path, size: int, difficulty: str) -> None:
        self.archive = release
        self.inner = f"pathfinder{size}/{difficulty}/"
        self.where = f"{release}/{self.inner.rstrip('/')}"
        self.files: dict[str, bytes] = {}

    def digest(self) -> str:
        try:
            with self.archive.open("rb") as file:
                beginning = file.read(2**20)
            return hashlib.blake2b(beginning, digest_size=6).hexdigest() + f"-{self.archive.stat().st_size}"
        except OSError as error:
            raise ValueError(
                f"release must be lra_release.gz, or the folder lra_release/lra_release of it; got {self.archive}: "
                f"{error.strerror or error}."
            ) from error

    def open(self) -> None:
        for member in archives.members(self.archive, lambda name: self.inner in f"/{name}", largest=2**26):
            self.files[member.name.partition(self.inner)[2]] = member.content
        if not self.tables():
            raise ValueError(f"{self.archive} must have {self.inner}metadata/0.npy and others in it; it has none.")

    def tables(self) -> list[str]:
        return [path for path in self.files if path.startswith("metadata/") and path.endswith(".npy")]

    def size(self, path: str) -> int:
        if path not in self.files:
            raise FileNotFoundError(2, "No such member", path)
        return len(self.files[path])

    def read(self, path: str) -> bytes:
        return self.files[path]


def _entries(files: _Files, console: Console) -> list[Entry]:
    """Of all tables, in the order of their numbers, without those of empty images."""
    numbered = []
    for path in files.tables():
        stem = PurePosixPath(path).stem
        if not stem.isdecimal():
            raise ValueError(f"{files.name(path)} must have a number for a name, as 0.npy.")
        numbered.append((int(stem), path))
    found: list[Entry] = []
    empty: list[Entry] = []
    for _, path in sorted(numbered):
        for entry in parse(files.read(path), files.name(path)):
            try:
                (found if files.size(entry.path) else empty).append(entry)
            except OSError as error:
                raise ValueError(
                    f"{files.name(entry.path)} must be an image, since {path} lists it; got {error.strerror or error}."
                ) from error
    if empty:
        console.print(
            f"left out {len(empty)} of {len(found) + len(empty):,} images that are empty files: "
            f"{', '.join(files.name(entry.path) for entry in empty[:3])}{', ...' if len(empty) > 3 else ''}",
            soft_wrap=True,
        )
    return found


def parse(content: bytes, name: str) -> list[Entry]:
    """The images of a table.

    Raises:
      ValueError: for the first line that is wrong, naming the file and the line.

    >>> parse(b"imgs/0 sample_0.png 0 1 1.8 14 4 5 1.5 3 1", "0.npy")
    [Entry(path='imgs/0/sample_0.png', label=1)]
    """
    return [_entry(fields, name, line) for line, fields in enumerate(_fields(content, name), start=1)]


def _fields(content: bytes, name: str) -> Sequence[Sequence[str]]:
    if not content.startswith(b"\x93NUMPY"):
        return [line.split() for line in content.decode(errors="replace").splitlines()]
    try:
        table = np.load(io.BytesIO(content), allow_pickle=False)  # a pickle could run anything
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name} must be a whole table, as text or an array of strings; got {error}.") from error
    if table.ndim != 2 or table.dtype.kind not in "US":
        raise ValueError(
            f"{name} must be a table of strings; got an array of shape {table.shape} and dtype {table.dtype}."
        )
    return table.astype(str).tolist()


def _entry(fields: Sequence[str], name: str, line: int) -> Entry:
    if len(fields) < 4:
        raise ValueError(
            f"{name}, line {line}: expected a folder, a file, a number and a label; got {' '.join(fields)[:60]!r}."
        )
    path = PurePosixPath(fields[0], fields[1])
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name}, line {line}: the image must be below the folder of the table; got {f'{path}'!r}.")
    if fields[3] not in _LABELS:
        raise ValueError(f"{name}, line {line}: the label must be 0 or 1; got {fields[3]!r}.")
    return Entry(str(path), _LABELS[fields[3]])


def _rows(files: _Files, entries: Sequence[Entry], size: int) -> Iterator[Row]:
    for entry in entries:
        yield Row(picture(files.read(entry.path), files.name(entry.path), size), entry.label)


def picture(content: bytes, name: str, size: int) -> np.ndarray:
    """An image file's pixels, uint8 (size, size).

    Raises:
      ValueError: naming the file, if it is damaged or has another size.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode != "L" or image.size != (size, size):
                raise ValueError(f"it has the mode {image.mode} and {image.width} × {image.height} pixels")
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of them for damaged files
        raise ValueError(
            f"{name} must be a gray image of {size} × {size} pixels, 8 bits each; got one that cannot be used "
            f"({error}). Unpack it again from lra_release.gz, or make it an empty file to leave it out."
        ) from error
