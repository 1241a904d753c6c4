"""Text as numbers: bytes, or the tokens of any `tokenizer.json`."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What turns documents into tokens and back."""

    name: str
    """For people, and the same for the same tokens alone."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def separator(self) -> int:
        """The token between documents."""
        ...

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of UTF-8 text."""
        ...

    def decode(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 text of tokens; that of part of a character may be part of one."""
        ...


class ByteTokenizer:
    r"""Each byte of UTF-8 is a token, and 256 stands between documents.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("é!".encode()).tolist()
    [195, 169, 33]
    >>> tokenizer.decode([195, 169, 33, 256]).decode()
    'é!\\n'
    """

    name = "bytes"
    vocab_size = 257
    separator = 256

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        numbers = np.asarray(tokens)
        return np.where(numbers == self.separator, ord("\n"), numbers).astype(np.uint8).tobytes()


class FileTokenizer:
    """The tokens of a `tokenizer.json`, as the `tokenizers` library reads it.

    Raises:
      ValueError: if there is no such file, it is not a tokenizer, no token for the end of a text is in it, or the
        library is not installed.
    """

    ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                f"tokenizer {path} needs the library tokenizers: pip install tokenizers; or leave it out for bytes."
            ) from error
        try:
            content = path.read_bytes()
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        except OSError as error:
            raise ValueError(f"tokenizer must be a tokenizer.json; got {path} ({error.strerror}).") from error
        except Exception as error:  # the library's own, which is an Exception alone
            raise ValueError(f"tokenizer must be a tokenizer.json; got {path} ({error}).") from error
        self.name = f"{path.name} {hashlib.sha256(content).hexdigest()[:16]}"
        ends = [number for end in self.ENDS if (number := self._tokenizer.token_to_id(end)) is not None]
        if not ends:
            raise ValueError(f"tokenizer must have one of {', '.join(self.ENDS)} to end a text; {path} has none.")
        self.separator: int = ends[0]

    @cached_property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: bytes) -> np.ndarray:
        return np.array(self._tokenizer.encode(text.decode(), add_special_tokens=False).ids, np.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        return self._tokenizer.decode(list(map(int, tokens)), skip_special_tokens=False).encode()


def make_tokenizer(path: Path | None) -> Tokenizer:
    """That of a `tokenizer.json`, or of bytes."""
    return ByteTokenizer() if path is None else FileTokenizer(path)
