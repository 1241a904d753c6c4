"""Factor plans: the lengths of the dense blocks that a butterfly transform multiplies by, one after the other."""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

MAX_ORDER = 4

# A stage also reads and writes the whole row, which costs about as much as this many multiply-adds per element.
# Float32 on 2 CPU cores, forward convolution of 2^20 points, ms: n = 256 18.8, 12.4, 15.5 for orders 1, 2, 3;
# n = 4096 22.5, 18.1, 17.2 for orders 2, 3, 4; n = 131072 102, 57, 46. 16 to 40 explain that; a GPU is at the high end.
_STAGE_OVERHEAD = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """A transform of length ``n = f_1 * ... * f_p`` by dense blocks of ``f_1``, ..., ``f_p`` points, 1 <= p <= 4.

    A row x[t] is seen as ``x[n_1, ..., n_p]`` in row-major order. Its spectrum has the same shape and is never put in
    order: ``X[k_1, ..., k_p]`` holds frequency ``k_1 + f_1 * (k_2 + f_2 * (k_3 + f_3 * k_4))``.

    Raises:
      ValueError: the order is not 1..4, or a factor is not a positive integer.

    Example:
      >>> Plan((4, 2)).frequencies.tolist()
      [[0, 4], [1, 5], [2, 6], [3, 7]]
    """

    factors: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.factors, tuple) or not 1 <= len(self.factors) <= MAX_ORDER:
            raise ValueError(f"factors must be a tuple of 1 to {MAX_ORDER} integers, got {self.factors!r}")
        if any(not isinstance(f, int) or isinstance(f, bool) or f < 1 for f in self.factors):
            raise ValueError(f"every factor must be a positive integer, got {self.factors!r}")

    @property
    def n(self) -> int:
        """Length of the transform."""
        return math.prod(self.factors)

    @property
    def order(self) -> int:
        """Number of factors."""
        return len(self.factors)

    @property
    def cost(self) -> int:
        """Relative cost of a transform of one row: each stage costs its factor per element, plus the pass itself."""
        return self.n * (sum(self.factors) + _STAGE_OVERHEAD * self.order)

    @property
    def frequencies(self) -> Int[np.ndarray, "*factors"]:
        """The frequency that each place of the spectrum holds: ``X == np.fft.fft(x)[plan.frequencies]``."""
        return np.arange(self.n).reshape(self.factors[::-1]).transpose()


@functools.lru_cache(maxsize=1024)
def plan(n: int, order: int | None = None, max_factor: int | None = None) -> Plan:
    """The cheapest plan of exactly ``n`` points, largest factor first.

    Largest first because the first and the last product of a convolution have one real side, which halves them.
    A prime n has the plan ``(n,)`` (or ``(n, 1, ...)`` when an order is asked for).

    Args:
      n: length of the transform, at least 1.
      order: number of factors, 1 to 4; None takes the cheapest.
      max_factor: largest factor allowed; None allows any.

    Raises:
      ValueError: n or order is out of range, or n has no such factors.

    Example:
      >>> plan(4096).factors, plan(4096, order=2).factors, plan(17).factors
      ((16, 16, 16), (64, 64), (17,))
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if order is not None and not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order must be 1 to {MAX_ORDER}, got {order}")
    limit = n if max_factor is None else max_factor
    divisors = [d for d in _divisors(n) if d <= limit]
    orders = range(1, MAX_ORDER + 1) if order is None else (order,)
    candidates = [Plan(factors) for p in orders for factors in _factorizations(n, p, divisors)]
    if not candidates:
        wanted = f"1 to {MAX_ORDER}" if order is None else str(order)
        raise ValueError(f"n = {n} is not a product of {wanted} factors of at most {limit}")
    return min(candidates, key=lambda candidate: candidate.cost)


@functools.lru_cache(maxsize=1024)
def fast_plan(minimum: int) -> Plan:
    """The cheapest plan of at least ``minimum`` points: where a convolution of an awkward length is padded to.

    Up to 64 points one block of exactly that length competes; beyond, factors are 1, 2, 3 and (4, 5, 6, 7) * 2^j.
    Padding is 14 % at most, and 1.4 % on average from 1,000 to 100,000 points.

    Raises:
      ValueError: minimum is below 1.

    Example:
      >>> fast_plan(1009).factors, fast_plan(3).factors
      ((32, 32), (3,))
    """
    if minimum < 1:
        raise ValueError(f"minimum must be at least 1, got {minimum}")
    candidates: list[tuple[int, ...]] = [(minimum,)] if minimum <= 64 else []
    for order in range(2, MAX_ORDER + 1):
        candidates += _coverings(minimum, order)
    return min((Plan(factors) for factors in candidates), key=lambda candidate: candidate.cost)


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _factorizations(n: int, order: int, divisors: list[int]) -> list[tuple[int, ...]]:
    """Every non-increasing way to write n as a product of ``order`` of the divisors."""
    if order == 1:
        return [(n,)] if n in divisors else []
    return [
        (first, *rest)
        for first in divisors
        if n % first == 0
        for rest in _factorizations(n // first, order - 1, [d for d in divisors if d <= first])
    ]


def _coverings(minimum: int, order: int) -> Iterator[tuple[int, ...]]:
    """Non-increasing tuples of ``order`` fast sizes whose product reaches ``minimum``, the first as small as can be.

    Equal factors are the cheapest, so none beyond twice the root is worth a look.
    """
    root = minimum ** (1 / order)
    sizes = [1, 2, 3, *(m << j for j in range(max(1, int(root).bit_length())) for m in (4, 5, 6, 7))]
    sizes = [size for size in sizes if size <= 2 * root + 2]
    for smallest_first in itertools.combinations_with_replacement(sizes, order - 1):
        largest = sizes[min(bisect.bisect_left(sizes, minimum / math.prod(smallest_first)), len(sizes) - 1)]
        factors = (largest, *reversed(smallest_first))
        if math.prod(factors) >= minimum and largest >= factors[1]:
            yield factors
