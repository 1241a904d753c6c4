"""Ctrl-C without a loss: what takes long is asked to end where that costs nothing, and made to by a second Ctrl-C."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax


class Interrupts:
    """Hears Ctrl-C (SIGINT) while it is open: the first is remembered, the second raises `KeyboardInterrupt`.

    Nothing changes where one process alone cannot end, as others wait for it, or where Python takes no signals, outside
    of the main thread.

    Example:
      >>> import os, signal
      >>> with Interrupts() as interrupts:
      ...     os.kill(os.getpid(), signal.SIGINT)
      ...     print("goes on")
      goes on
      >>> interrupts.heard
      True
    """

    def __init__(self) -> None:
        self.heard = False
        self._before: Any = None

    def __enter__(self) -> "Interrupts":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.heard:
            raise KeyboardInterrupt
        self.heard = True
