"""What a run of functional magnetic resonance imaging is here, and what every source of them offers."""

from typing import NamedTuple, Protocol

import numpy as np


class Origin(NamedTuple):
    """What is known of a run without reading it."""

    dataset: str
    subject: str
    name: str


class Run(NamedTuple):
    """A run, or a trial of one."""

    bold: np.ndarray
    """float32 (T, networks): the blood-oxygen-level-dependent signal of each network, of mean 0 and deviation 1."""

    t_r: float
    """Repetition time, seconds from one volume to the next."""

    label: int | None
    """Of the task, where there is one."""


class Runs(Protocol):
    """A random-access source of runs."""

    origins: list[Origin]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Run:
        """Raises ValueError, naming the file, for one that is not a run."""
        ...


def checked(bold: object, t_r: object, label: object, where: str) -> Run:
    """A run of what was read, if it is one.

    Args:
      bold: the signal.
      t_r: the repetition time.
      label: of the task, or None.
      where: it was read, for the message.

    Raises:
      ValueError: naming the place, what was expected there, and what was found.
    """
    if not isinstance(bold, np.ndarray) or bold.ndim != 2 or bold.dtype.kind != "f" or 0 in bold.shape:
        found = f"{bold.dtype} {bold.shape}" if isinstance(bold, np.ndarray) else type(bold).__name__
        raise ValueError(f"{where}: expected a signal of real numbers, volumes by networks; got {found}.")
    if not np.isfinite(bold).all():
        raise ValueError(f"{where}: expected a finite signal; got {bold[~np.isfinite(bold)][0]}.")
    seconds = _number(t_r, float, f"{where}: expected a repetition time in seconds")
    if not 0 < seconds < 60:
        raise ValueError(f"{where}: expected a repetition time between 0 and 60 seconds; got {seconds}.")
    number = None if label is None else _number(label, int, f"{where}: expected a label, an integer")
    if number is not None and number < 0:
        raise ValueError(f"{where}: expected a label of at least 0; got {number}.")
    return Run(np.ascontiguousarray(bold, np.float32), seconds, number)


def _number[T: (int, float)](value: object, kind: type[T], expected: str) -> T:
    try:
        number = kind(np.asarray(value).item())
        if number != np.asarray(value).item():
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{expected}; got {str(value)[:40]!r}.") from None
    return number
