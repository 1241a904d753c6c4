"""Times calls that a device runs asynchronously.

A queue of calls hides what the host spends on each, some 20 microseconds, as long as the device spends more.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

type Round = Callable[[int], float]
"""Queues so many calls, waits for the last one, and returns the seconds that all of them took."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to look at one row."""

    repeats: int = 15
    """Rounds, of which the median counts."""
    round_seconds: float = 0.05
    """Calls are queued for about so long: waiting once costs some 50 microseconds, 0.1 % of it."""
    limit_seconds: float = 2.0
    """No new round starts after so long, once three are done."""


def host_round(call: Callable[[Any], Any], sets: Sequence[Any], wait: Callable[[Any], Any]) -> Round:
    """A round on the host's clock that goes around the sets of inputs."""
    around = itertools.cycle(sets)

    def run(calls: int) -> float:
        wait(call(next(around)))  # the queue is empty, and the device awake, when the clock starts
        start = time.perf_counter()
        for _ in range(calls):
            result = call(next(around))
        wait(result)
        return time.perf_counter() - start

    return run


def seconds_per_call(run: Round, effort: Effort) -> np.ndarray:
    """Seconds of a call in each round, after warming up."""
    run(1)
    once = run(2) / 2
    calls = max(1, min(1000, math.ceil(effort.round_seconds / once)))
    started = time.perf_counter()
    taken: list[float] = []
    while len(taken) < effort.repeats:
        if len(taken) >= 3 and time.perf_counter() - started > effort.limit_seconds:
            break
        taken.append(run(calls) / calls)
    return np.array(taken)
