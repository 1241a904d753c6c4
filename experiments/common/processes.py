"""Work that is numbered, shared out to processes."""

import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from multiprocessing.context import SpawnContext, SpawnProcess


def in_processes[T](function: Callable[[int], T], workers: int) -> Iterator[T]:
    """The function of 0, 1, 2, ..., in this order, by so many new processes. They end when the iterator is closed.

    The processes import the module of the function and what that imports, not the main module of the program.

    Raises:
      ValueError: if the function is one of the main module.
    """
    if _module(function) == "__main__":
        raise ValueError(
            f"function must be one of a module that new processes can import; got {function} of the main module, which "
            "they do not import. Define it in a file of its own."
        )
    return _in_processes(function, workers)


def _in_processes[T](function: Callable[[int], T], workers: int) -> Iterator[T]:
    # multiprocessing.Pool kills its workers to end them; one that dies while it sends holds the lock for ever.
    executor = ProcessPoolExecutor(workers, LightContext(), initializer=end_with_the_parent)
    numbers = itertools.count()
    try:
        # Executor.map would take all the numbers at once, and there is no end of them.
        ahead = [executor.submit(function, next(numbers)) for _ in range(2 * workers)]
        while True:
            yield ahead.pop(0).result()
            ahead.append(executor.submit(function, next(numbers)))
    finally:
        executor.shutdown(cancel_futures=True)


def _module(function: Callable) -> str | None:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__module__", None)


def end_with_the_parent() -> None:
    """Leaves interrupts to the parent, and ends this process with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class LightProcess(SpawnProcess):
    """A spawned process that does not import the main module, and uses one thread for its arithmetic.

    The main module of a training run imports JAX, which takes seconds and memory that drawing has no use for.
    """

    _starting = threading.Lock()  # what a new process finds is changed for all threads

    def start(self) -> None:
        with self._starting, _main_module_left_out(), _one_thread():
            super().start()


class LightContext(SpawnContext):
    """The ways of `multiprocessing`, with light processes."""

    Process = LightProcess


@contextmanager
def _main_module_left_out() -> Iterator[None]:
    """Processes spawned in this context do not import the main module.

    They import what `__spec__` names, or else `__file__`, unless the name is `__main__`, as that of a package's
    `__main__.py`.
    """
    main = sys.modules["__main__"]
    before = main.__spec__
    main.__spec__ = ModuleSpec("__main__", None)
    try:
        yield
    finally:
        main.__spec__ = before


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started in this context use one thread each for their arithmetic."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
