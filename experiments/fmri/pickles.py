"""Pickled arrays and numbers of numpy, and nothing else.

A pickle is a program: reading one may call whatever it names. Here it can name what numpy makes its arrays and numbers
of, of version 1 or 2, and anything else is refused before it is called.
"""

import io
import pickle
from typing import Any, Final

ALLOWED: Final = frozenset(
    {
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # of bytes that version 2 of the protocol has as text
    }
)


def loads(content: bytes, where: str) -> Any:
    """The array or number of a pickle.

    Args:
      content: of a file.
      where: it is from, for the message.

    Raises:
      ValueError: if it is no pickle, or one of something else.

    Example:
      >>> loads(pickle.dumps(len), "run.pyd")
      Traceback (most recent call last):
      ValueError: run.pyd: expected a pickle of a numpy array or number; got one that calls builtins.len.
    """
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except _RefusedError as error:
        raise ValueError(f"{where}: expected a pickle of a numpy array or number; got {error}.") from None
    except Exception as error:  # damaged pickles raise errors of every kind
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{where}: expected a pickle of a numpy array or number; got a damaged one ({reason})."
        ) from error


class _RefusedError(Exception):
    """What was refused."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        renamed = module.replace("numpy.core.", "numpy._core.", 1)  # what numpy 1 called it
        if (renamed, name) not in ALLOWED:
            raise _RefusedError(f"one that calls {module}.{name}")
        return super().find_class(renamed, name)

    def persistent_load(self, identity: Any) -> Any:
        raise _RefusedError("one that refers to something outside of it")
