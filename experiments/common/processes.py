"""Work that is numbered, shared out to processes."""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def in_processes[T](function: Callable[[int], T], workers: int) -> Iterator[T]:
    """The function of 0, 1, 2, ..., in this order, by so many new processes. They end when the iterator is closed."""
    with one_thread(), multiprocessing.get_context("spawn").Pool(workers) as pool:
        numbers = itertools.count()
        # Pool.imap would take all the numbers at once, and there is no end of them.
        ahead = [pool.apply_async(function, (next(numbers),)) for _ in range(2 * workers)]
        while True:
            yield ahead.pop(0).get()
            ahead.append(pool.apply_async(function, (next(numbers),)))


@contextmanager
def one_thread() -> Iterator[None]:
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
