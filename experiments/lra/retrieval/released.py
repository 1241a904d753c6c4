"""The pairs of papers that Long Range Arena released: `tsv_data/new_aan_pairs.{train,eval,test}.tsv`.

A line is `label`, `id1`, `id2`, `text1`, `text2`, with tabs between, without a header and without quoting: a quotation
mark is a character like any other. The label is 1.0 where one paper cites the other, else 0.0.
"""

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

FILES: Final = ("new_aan_pairs.train.tsv", "new_aan_pairs.eval.tsv", "new_aan_pairs.test.tsv")  # as the splits
FIELDS: Final = ("label", "id1", "id2", "text1", "text2")
RELEASE: Final = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
_LABELS: Final = {b"0.0": 0, b"1.0": 1, b"0": 0, b"1": 1}
_BLOCK: Final = 2**24  # bytes


def read(tsv_dir: Path) -> tuple["Pairs", "Pairs", "Pairs"]:
    """The training, the validation and the test pairs.

    Raises:
      ValueError: if a file is missing, or not what it should be.
    """
    missing = [name for name in FILES if not (tsv_dir / name).is_file()]
    if missing:
        raise ValueError(
            f"tsv_dir must be a folder with {', '.join(FILES[:-1])} and {FILES[-1]}, such as tsv_data of the release "
            f"{RELEASE}; got {tsv_dir}, which lacks {', '.join(missing)}."
        )
    train, validation, test = (Pairs(tsv_dir / name) for name in FILES)
    return train, validation, test


class Pair(NamedTuple):
    texts: tuple[bytes, bytes]
    label: int
    """1 where one cites the other."""


class Pairs:
    """The pairs of a file, each read where it lies. Opening it reads all of it once, for the places of the tabs.

    Raises:
      ValueError: for a file that is empty or cannot be read, or for the first line that is not what it should be.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._content = np.asarray(np.memmap(file, np.uint8, "r"))
        except (OSError, ValueError) as error:  # ValueError for an empty one
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise ValueError(f"{file} must be a readable file of pairs; got {reason or error}.") from error
        self._fields = self._find_fields()
        self.labels = np.array([self._label(row) for row in range(len(self))], np.int32)
        """int32 (pairs,)."""

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, row: int, /) -> Pair:
        second = self._text(row, 4).rstrip(b"\r")  # of a file that went through Windows
        return Pair((self._text(row, 3), second), int(self.labels[row]))

    def _text(self, row: int, field: int) -> bytes:
        start, end = self._fields[row, field], self._fields[row, field + 1] - 1
        return self._content[start:end].tobytes()

    def _label(self, row: int) -> int:
        text = self._text(row, 0)
        if text not in _LABELS:
            raise self._wrong(row, "the label 0.0 or 1.0", text)
        return _LABELS[text]

    def _find_fields(self) -> np.ndarray:
        """int64 (pairs, 6): where each field begins, and the next line; each ends one byte before the next begins."""
        separators = self._separators()
        is_end = self._content[separators] == ord("\n")
        if self._content[-1] != ord("\n"):  # the last line may lack it
            separators, is_end = np.append(separators, len(self._content)), np.append(is_end, True)
        ends = np.flatnonzero(is_end)
        counts = np.diff(ends, prepend=-1)
        wrong = np.flatnonzero(counts != len(FIELDS))
        if len(wrong):
            row = int(wrong[0])
            raise self._wrong(row, f"{', '.join(FIELDS)}, with tabs between", self._line(separators[ends], row))
        fields = np.empty((len(ends), len(FIELDS) + 1), np.int64)
        fields[:, 1:] = separators.reshape(-1, len(FIELDS)) + 1
        fields[0, 0] = 0
        fields[1:, 0] = fields[:-1, -1]
        return fields

    def _separators(self) -> np.ndarray:
        """int64: where the tabs and the ends of lines are."""
        found = []
        for start in range(0, len(self._content), _BLOCK):
            block = self._content[start : start + _BLOCK]
            found.append(np.flatnonzero((block == ord("\t")) | (block == ord("\n"))) + start)
        return np.concatenate(found)

    def _line(self, ends: np.ndarray, row: int) -> bytes:
        start = ends[row - 1] + 1 if row else 0
        return self._content[start : min(ends[row], start + 80)].tobytes()

    def _wrong(self, row: int, expected: str, got: bytes) -> ValueError:
        shown = got[:40].decode(errors="replace") + ("..." if len(got) > 40 else "")
        return ValueError(f"{self._file}, line {row + 1}: expected {expected}; got {shown!r}.")
