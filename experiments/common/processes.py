"""Work that is numbered, shared out to processes."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


def in_processes[T](function: Callable[[int], T], workers: int) -> Iterator[T]:
    """The function of 0, 1, 2, ..., in this order, by so many new processes. They end when the iterator is closed."""
    # multiprocessing.Pool kills its workers to end them; one that dies while it sends holds the lock for ever.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=end_with_the_parent)
    numbers = itertools.count()
    try:
        with one_thread():
            # Executor.map would take all the numbers at once, and there is no end of them.
            ahead = [executor.submit(function, next(numbers)) for _ in range(2 * workers)]
        while True:
            yield ahead.pop(0).result()
            with one_thread():  # it may start another process
                ahead.append(executor.submit(function, next(numbers)))
    finally:
        executor.shutdown(cancel_futures=True)


def end_with_the_parent() -> None:
    """Leaves interrupts to the parent, and ends this process with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


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
