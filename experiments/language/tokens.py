"""A corpus as arrays of tokens on the disk, one for each split, whole or not there; and windows of them."""

import contextlib
import dataclasses
import hashlib
import json
import lzma
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from rich.console import Console

from experiments.common.preparation import prepared
from experiments.language.corpus import SPLITS, Corpus, SplitName
from experiments.language.tokenizers import Tokenizer

_XZ_AT_MOST = 1 << 25  # bytes of training text that xz is shown before the others


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """What is known of a split's text."""

    documents: int
    tokens: int
    bytes: int
    """Of its text, without what separates documents."""
    gzip: int | None = None
    """Bytes that it takes compressed, at level 9: of `validation` and `test`."""
    xz: int | None = None
    """Likewise, at level 6."""
    xz_after_train: int | None = None
    """How many more bytes xz takes for `test` after the training text; None where that is long."""


class Tokens:
    """The splits of a corpus, memory-mapped.

    Documents of a split stand in their order, with the tokenizer's separator after each.
    """

    def __init__(self, folder: Path) -> None:
        description = json.loads((folder / "tokens.json").read_text())
        self.vocab_size: int = description["vocab_size"]
        self.info = {name: SplitInfo(**info) for name, info in description["splits"].items()}
        self._arrays = {
            name: np.memmap(folder / f"{name}.bin", description["dtype"], "r", shape=(info.tokens,))
            for name, info in self.info.items()
        }

    def __getitem__(self, split: SplitName) -> np.ndarray:
        return self._arrays[split]

    @classmethod
    def of(
        cls,
        corpus: Corpus,
        tokenizer: Tokenizer,
        data_dir: Path,
        *,
        separate: bool = True,
        console: Console | None = None,
    ) -> Self:
        """Those of a corpus, written below a folder the first time, and again where a file has changed.

        Args:
          corpus: of which all three splits must have text.
          tokenizer: by which.
          data_dir: the folder.
          separate: whether there is a separator after each document; WikiText's rows are lines of one text.
          console: for progress.

        Raises:
          ValueError: if a split or a file has no text, or the folder cannot be written to. Nothing half is kept.
        """
        stamps = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in corpus.files]
        what = json.dumps([stamps, tokenizer.name, separate])
        folder = data_dir / "language" / f"{corpus.root.name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
        console = console or Console(quiet=True)
        return cls(prepared(folder, lambda: _write(folder, corpus, tokenizer, separate, console), console))


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer, separate: bool, console: Console) -> None:
    beside = folder.with_name(f"incomplete.0_{folder.name}")
    beside.mkdir()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    try:
        with contextlib.ExitStack() as stack, console.status(f"tokenizing {corpus.root}") as status:
            splits = {
                name: _Split(name, stack.enter_context((beside / f"{name}.bin").open("wb")), dtype) for name in SPLITS
            }
            for number, document in enumerate(corpus.documents()):
                splits[document.split].add(document.text, tokenizer, separate)
                if number % 100 == 0:
                    done = sum(split.bytes for split in splits.values())
                    status.update(f"tokenizing {corpus.root}: {number:,} documents, {done / 1e6:,.1f} MB")
            status.update("compressing for comparison")
            infos = {name: split.info() for name, split in splits.items()}
            train, test = splits["train"].text, splits["test"].text
            if train is not None and test is not None:
                more = _xz_size(train + test) - _xz_size(train)
                infos["test"] = dataclasses.replace(infos["test"], xz_after_train=more)
        for name, info in infos.items():
            if not info.tokens:
                raise ValueError(
                    f"{corpus.root} must have text for train, validation and test; there is none for {name}. Files "
                    "named so are the splits; otherwise one document of 50 is for each of the others, so that it "
                    "takes some hundred documents."
                )
        description = {
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.name,
            "dtype": dtype.name,
            "splits": {name: dataclasses.asdict(info) for name, info in infos.items()},
        }
        (beside / "tokens.json").write_text(json.dumps(description, indent=2) + "\n")
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


class _Split:
    """What is known of a split so far."""

    def __init__(self, name: SplitName, file: BinaryIO, dtype: np.dtype) -> None:
        self._file, self._dtype, self._is_compressed = file, dtype, name != "train"
        self.documents = self.tokens = self.bytes = self._gzip_bytes = self._xz_bytes = 0
        self._gzip, self._xz = zlib.compressobj(9), lzma.LZMACompressor()
        self._kept: list[bytes] | None = []

    def add(self, text: bytes, tokenizer: Tokenizer, separate: bool) -> None:
        tokens = tokenizer.encode(text).astype(self._dtype)
        if separate:
            tokens = np.append(tokens, self._dtype.type(tokenizer.separator))
        self._file.write(tokens.tobytes())
        self.documents, self.tokens, self.bytes = self.documents + 1, self.tokens + len(tokens), self.bytes + len(text)
        if self._is_compressed:
            self._gzip_bytes += len(self._gzip.compress(text))
            self._xz_bytes += len(self._xz.compress(text))
        if self._kept is not None:
            self._kept.append(text)
            if self.bytes > _XZ_AT_MOST:
                self._kept = None

    @property
    def text(self) -> bytes | None:
        """All of it, unless it is too long."""
        return None if self._kept is None else b"".join(self._kept)

    def info(self) -> SplitInfo:
        self._file.flush()
        info = SplitInfo(self.documents, self.tokens, self.bytes)
        if not self._is_compressed:
            return info
        gzip = self._gzip_bytes + len(self._gzip.flush()) + 12  # and gzip's header and checksum beyond zlib's
        return dataclasses.replace(info, gzip=gzip, xz=self._xz_bytes + len(self._xz.flush()))


def _xz_size(text: bytes) -> int:
    """With a dictionary that all of it fits into."""
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2 * _XZ_AT_MOST}]
    return len(lzma.compress(text, filters=chain))


class Windows:
    """Stretches of tokens of one length, one after the other, each with the tokens that follow: rows of a batch.

    The last token of a window's labels is the first input of the next; what is left in the end is dropped.
    """

    def __init__(self, tokens: np.ndarray, length: int, at_most: int | None = None) -> None:
        self._tokens, self._length = tokens, length
        count = (len(tokens) - 1) // length
        self._count = count if at_most is None else min(count, at_most)
        if count < 1:
            raise ValueError(
                f"length must be below the {len(tokens):,} tokens of each split; got {length:,}: shorten the windows, "
                "or take more text."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        start = number * self._length
        window = np.asarray(self._tokens[start : start + self._length + 1], np.int32)
        return {"inputs": window[:-1], "labels": window[1:]}


def sliding_windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int]]:
    """Where windows of labels begin that together hold each but the first of so many tokens, and how many of each
    window's last labels are new.

    >>> list(sliding_windows(9, length=4, stride=2))
    [(0, 4), (2, 2), (4, 2)]
    """
    start, seen = 0, 0
    while seen < count - 1:
        end = min(start + length, count - 1)
        yield start, end - seen
        start, seen = start + stride, end
