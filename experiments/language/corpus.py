"""Documents from wherever there is text: files, folders, parquet, JSON lines, or Python's own standard library."""

import json
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

type SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")

# Names of files that say which split they are: wiki.valid.raw, train-00000-of-00002.parquet, test.jsonl.
_SAYS_SPLIT = re.compile(r"(?:^|[._-])(train|valid|validation|val|test)(?=[._-]|$)")
_TEXT_COLUMNS = ("text", "content")


class Document(NamedTuple):
    """Some text of a split."""

    split: SplitName
    text: bytes
    """UTF-8."""


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus, and how they are divided.

    Where the names of files say it (train, valid or validation, test), they are the splits. Otherwise each document
    belongs to one by its number: of 50 documents one to `test` and one to `validation`, the others to `train`, by a
    hash of the file's name below the folder and of the document's number in it.
    """

    files: tuple[Path, ...]
    root: Path
    skip_binary: bool = False
    """Leaves out what is not UTF-8 instead of refusing it: for the standard library, whose files are given."""

    @property
    def named_splits(self) -> bool:
        return any(split_of_name(file.name) for file in self.files)

    def documents(self) -> Iterator[Document]:
        """All documents in the order of the files.

        Raises:
          ValueError: if a file is empty or binary, or is not what its name says.
        """
        named = self.named_splits
        for file in self.files:
            split = split_of_name(file.name)
            if named and split is None:
                continue
            for number, text in enumerate(_texts(file, self.skip_binary)):
                if text:
                    key = f"{file.relative_to(self.root)}:{number}"
                    yield Document(split or split_of_hash(key), text)


def split_of_name(name: str) -> SplitName | None:
    """The split that a file's name says.

    >>> split_of_name("wiki.valid.tokens"), split_of_name("train-00000-of-00001.parquet"), split_of_name("latest.txt")
    ('validation', 'train', None)
    """
    match = _SAYS_SPLIT.search(name)
    if match is None:
        return None
    splits: dict[str, SplitName] = {"train": "train", "test": "test"}
    return splits.get(match[1], "validation")


def split_of_hash(key: str) -> SplitName:
    """A split for a document, the same one on every machine."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(key.encode()) % 50, "train")  # type: ignore[return-value]


def standard_library() -> Corpus:
    """The source files of the installed Python's standard library, without its tests and what else is installed."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not excluded & set(path.relative_to(root).parts)]
    return Corpus(tuple(sorted(file for file in files if file.stat().st_size)), root, skip_binary=True)


def corpus_of(path: Path, suffixes: tuple[str, ...] = ()) -> Corpus:
    """The files of a folder, hidden ones left out, or a file.

    Raises:
      ValueError: if there is none.
    """
    if path.is_file():
        return Corpus((path,), path.parent)
    if not path.is_dir():
        raise ValueError(f"path must be a file or a folder of text; got {path}, which is not there.")
    files = [
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and (not suffixes or file.suffix in suffixes)
    ]
    if not files:
        ending = f" that ends in {' or '.join(suffixes)}" if suffixes else ""
        raise ValueError(f"path must be a file or a folder of text; got {path}, which has no file{ending}.")
    return Corpus(tuple(sorted(files)), path)


def _texts(file: Path, skip_binary: bool) -> Iterator[bytes]:
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty, where text was expected; remove it, or choose files by suffixes.")
    match file.suffix:
        case ".parquet":
            yield from _parquet(file)
        case ".jsonl" | ".json":
            yield from _json_lines(file)
        case _:
            content = file.read_bytes()
            problem = _binary(content)
            if problem and not skip_binary:
                raise ValueError(
                    f"{file} is not UTF-8 text ({problem}); convert it, remove it, or choose files by suffixes."
                )
            yield b"" if problem else content


def _binary(content: bytes) -> str | None:
    """What is wrong with it as text."""
    if (position := content.find(b"\0")) >= 0:
        return f"a zero byte at position {position:,}"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{content[error.start]:02x} at position {error.start:,}"
    return None


def _parquet(file: Path) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        column = next((name for name in _TEXT_COLUMNS if name in names), None)
        if column is None:
            raise ValueError(f"{file} must have a column {' or '.join(_TEXT_COLUMNS)}; it has {', '.join(names)}.")
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0):
                yield (value.as_py() or "").encode()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a parquet file that can be read ({error}).") from error


def _json_lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                yield next(row[name] for name in _TEXT_COLUMNS if name in row).encode()
            except (ValueError, TypeError, AttributeError, StopIteration) as error:
                raise ValueError(
                    f"line {number} of {file} must be a JSON object with {' or '.join(_TEXT_COLUMNS)}; got "
                    f"{line[:60]!r}."
                ) from error
