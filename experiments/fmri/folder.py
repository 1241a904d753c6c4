"""Runs of one's own: a folder of `.npy` and `.npz` files with a table, `runs.csv`.

The table has a header and a line for each run: `file`, and `t_r` in seconds; `label`, `subject` and `dataset` where
there are such. A file is an array (T, networks), or an archive of numpy with one named `bold`.
"""

import csv
from pathlib import Path, PurePosixPath

import numpy as np

from experiments.fmri.runs import Origin, Run, checked

TABLE = "runs.csv"
COLUMNS = ("file", "t_r", "label", "subject", "dataset")


class Folder:
    """The runs of a folder's table, in its order.

    Args:
      folder: with the files and the table.
      labelled: whether runs must have a label.

    Raises:
      ValueError: if there is no table, or for the first line that is wrong.
    """

    def __init__(self, folder: Path, *, labelled: bool) -> None:
        self._folder = folder
        table = folder / TABLE
        try:
            with table.open(newline="", encoding="utf-8") as file:
                lines = csv.DictReader(file)
                header = tuple(lines.fieldnames or ())
                self._rows = [{name: value or "" for name, value in row.items() if name} for row in lines]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"array_dir must be a folder with {TABLE}, whose header is {','.join(COLUMNS)}, beside .npy or .npz "
                f"files; got {folder} ({error})."
            ) from error
        needed = {"file", "t_r"} | ({"label"} if labelled else set())
        if not needed <= set(header) <= set(COLUMNS):
            expected = ",".join(name for name in COLUMNS if name in needed)
            raise ValueError(f"{table}, line 1: expected the columns {expected}; got {','.join(header)!r}.")
        for number, row in enumerate(self._rows, start=2):
            path = PurePosixPath(row["file"])
            if path.suffix not in (".npy", ".npz") or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{table}, line {number}: expected a .npy or .npz file below it; got {row['file']!r}.")
            if labelled and not row["label"]:
                raise ValueError(f"{table}, line {number}: expected a label; got none.")
        if not self._rows:
            raise ValueError(f"{table}: expected a line for each run; got a header alone.")
        self.origins = [
            Origin(row.get("dataset") or folder.name, row.get("subject") or row["file"], row["file"])
            for row in self._rows
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Run:
        row = self._rows[number]
        path = self._folder / row["file"]
        return checked(_array(path), _number(row["t_r"]), _number(row.get("label")), str(path))


def _array(path: Path) -> np.ndarray:
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return content["bold"]
    except Exception as error:  # numpy and zipfile have many
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{path}: expected an array of numpy; got what cannot be read ({reason}).") from error


def _number(text: str | None) -> float | str | None:
    """As it is where it is none, for the check to say so."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return text
