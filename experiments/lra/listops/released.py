"""The files of ListOps that Long Range Arena released: `listops-1000/basic_{train,val,test}.tsv`.

A file has the header `Source`, tab, `Target`; then, one row to a line, an expression in binary parentheses such as
`( ( ( [MED 1 ) 2 ) ] )`, a tab, and its value. Parentheses carry no meaning beyond the brackets' and are dropped, as by
every published model.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.lra.listops import vocabulary
from experiments.lra.listops.dataset import Listops, Split, pack
from experiments.lra.listops.trees import Row

FILES = ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")  # in the order of the splits
HEADER = b"Source\tTarget"

_NUMBERS = {text.encode(): number for number, text in enumerate(vocabulary.TEXTS) if number >= vocabulary.FIRST_DIGIT}
_VALUES = {str(digit).encode(): digit for digit in range(vocabulary.DIGITS)}


def read(tsv_dir: Path, length: int) -> Listops:
    """The three files in memory, as sequences padded or cut to this length.

    Raises:
      ValueError: if a file is missing or cannot be read, or for the first line that is not what it should be.
    """
    missing = [name for name in FILES if not (tsv_dir / name).is_file()]
    if missing:
        raise ValueError(
            f"tsv_dir must be a folder with {', '.join(FILES[:-1])} and {FILES[-1]}, such as listops-1000 in "
            f"the release of Long Range Arena; got {tsv_dir}, which lacks {', '.join(missing)}."
        )
    return Listops(*(_split(tsv_dir / name, length) for name in FILES))


def _split(file: Path, length: int) -> Split:
    try:
        with file.open("rb") as lines:
            count = sum(1 for _ in lines) - 1
            if count < 1:
                raise ValueError(f"{file} must have a header and at least one row; got {count + 1} lines.")
        with file.open("rb") as lines:
            return pack(parse(lines, file), count, length)
    except OSError as error:
        raise ValueError(f"{file} must be readable; got {error.strerror or error}.") from error


def parse(lines: Iterator[bytes], file: Path) -> Iterator[Row]:
    """The rows of a file's lines.

    Raises:
      ValueError: for the first line that is wrong, naming the file, the line and what was expected.
    """
    for number, line in enumerate(lines, start=1):
        line = line.rstrip(b"\r\n")
        if number == 1:
            _require(line == HEADER, file, number, "the header 'Source', tab, 'Target'", line)
            continue
        source, tab, target = line.partition(b"\t")
        _require(bool(tab), file, number, "an expression, a tab and its value", line)
        _require(target in _VALUES, file, number, "a value from 0 to 9 behind the tab", target)
        words = source.translate(None, b"()").split()
        _require(len(words) > 0, file, number, "an expression before the tab", source)
        try:
            tokens = np.fromiter(map(_NUMBERS.__getitem__, words), np.uint8, len(words))
        except KeyError as error:
            known = " ".join(vocabulary.TEXTS[vocabulary.FIRST_DIGIT :])
            _require(False, file, number, f"one of {known}", error.args[0])
        yield Row(tokens, _VALUES[target])


def _require(fulfilled: bool, file: Path, line: int, expected: str, got: bytes) -> None:
    if not fulfilled:
        shown = got[:40].decode(errors="replace") + ("..." if len(got) > 40 else "")
        raise ValueError(f"{file}, line {line}: expected {expected}; got {shown!r}.")
