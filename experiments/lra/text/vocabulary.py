"""Text as sequences of small numbers: of its bytes, or of its characters, as the paper has it.

Of both, 0 is padding, 1 what the vocabulary lacks, 2 the end of every sequence.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Final, Literal

import numpy as np

PAD: Final = 0
UNKNOWN: Final = 1
END: Final = 2
FIRST: Final = 3

type Units = Literal["characters", "bytes"]
"""What a token is."""


class Vocabulary(ABC):
    """The numbers of the units of UTF-8 text."""

    size: int
    """Of the vocabulary with its three special tokens."""

    dtype: np.dtype
    """The smallest that holds them."""

    def sequence(self, text: bytes, length: int) -> tuple[np.ndarray, np.int32]:
        """A text with its end, cut where it does not fit and padded to this length; and how many tokens it has."""
        tokens = self.encode(text, length - 1)
        padded = np.full(length, PAD, self.dtype)
        padded[: len(tokens)] = tokens
        padded[len(tokens)] = END
        return padded, np.int32(len(tokens) + 1)

    @abstractmethod
    def encode(self, text: bytes, most: int | None = None) -> np.ndarray:
        """The numbers of a text, at most so many of them."""

    @abstractmethod
    def decode(self, tokens: np.ndarray) -> bytes:
        """The text until the end or the padding; what was unknown is U+FFFD."""

    @staticmethod
    def _until_end(tokens: np.ndarray) -> np.ndarray:
        ends = np.flatnonzero((tokens == END) | (tokens == PAD))
        return tokens[: ends[0]] if len(ends) else tokens


class Bytes(Vocabulary):
    """The byte b is the token 3 + b; nothing is unknown.

    Example:
      >>> Bytes().encode(b"abc").tolist()
      [100, 101, 102]
    """

    size = FIRST + 256
    dtype = np.dtype(np.uint16)

    def encode(self, text: bytes, most: int | None = None) -> np.ndarray:
        return np.frombuffer(text[:most], np.uint8).astype(self.dtype) + self.dtype.type(FIRST)

    def decode(self, tokens: np.ndarray) -> bytes:
        return (self._until_end(tokens) - FIRST).astype(np.uint8).tobytes()


class Characters(Vocabulary):
    """The characters of a text that are in a list; its order is theirs.

    Args:
      characters: each once.

    Example:
      >>> letters = Characters("abc")
      >>> letters.encode("cab é".encode()).tolist()
      [5, 3, 4, 1, 1]
      >>> letters.size
      6
    """

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.size = FIRST + len(characters)
        self.dtype = np.dtype(np.uint8 if self.size <= 256 else np.uint16)
        self._numbers = np.full(0x110000, UNKNOWN, self.dtype)  # by code point
        self._numbers[_code_points(characters.encode())] = np.arange(FIRST, self.size)

    def encode(self, text: bytes, most: int | None = None) -> np.ndarray:
        return self._numbers[_code_points(text, most)]

    def decode(self, tokens: np.ndarray) -> bytes:
        texts = ["", "\ufffd", "", *self.characters]
        return "".join(texts[token] for token in self._until_end(tokens)).encode()


def counted(texts: Iterable[bytes], least: int, most: int | None = None) -> Characters:
    """The characters that occur at least so often in the first `most` ones of each text, by code point.

    Example:
      >>> counted([b"banana", b"bandana"], least=3).characters
      'an'
    """
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        found, times = np.unique(_code_points(text, most), return_counts=True)
        counts[found] += times
    return Characters("".join(map(chr, np.flatnonzero(counts >= least))))


def _code_points(text: bytes, most: int | None = None) -> np.ndarray:
    """Of the first characters of a UTF-8 text; each byte that is not UTF-8 is U+FFFD."""
    if most is not None:
        text = text[: 4 * most]  # no character has more bytes
    return np.frombuffer(text.decode(errors="replace")[:most].encode("utf-32-le"), "<u4")


PRINTABLE_ASCII: Final = Characters("".join(map(chr, range(ord(" "), ord("~") + 1))))
"""98 tokens, as many as the paper's code finds in the papers of Retrieval."""
