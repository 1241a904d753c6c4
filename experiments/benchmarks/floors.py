"""The least that a convolution must move and multiply, and how long a device takes for that.

Bytes: every array of the call is read or written once. FLOP: the cheapest plan of dense DFT blocks whose sizes are
powers of two from 16, the depth of a tensor-core product. With factors f1, f2, .. of n >= L points, the right-angle
transform of a real row and the way back multiply by each block once, complex by complex but for the first and the last
product, which have a real side:

    causal    FLOP per row = n (8 f1 + 16 (f2 + ..))
    circular  FLOP per row = n 8 (f1 + f2 + ..)          (two real rows are one complex row)

The transform of the kernel, one row for each feature, is 1 / B of that and left out.
"""

import dataclasses
import functools
import itertools
import math

from experiments.benchmarks.cases import Case

FUSED_FIRST_FACTOR = 64
FUSED_SECOND_FACTORS = (16, 32, 64)
FUSED_BLOCKS = {False: 8, True: 4}
"""The most blocks of a sequence in one launch, by whether taps reach ahead as well."""
TRITON_FACTORS = ((64, 16), (64, 32), (64, 64), (128, 64))


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a device was measured to reach."""

    bytes_per_second: float
    """Of a large copy, bytes read and bytes written."""
    flop_per_second: float
    """Of a large bfloat16 matrix product on random numbers; the float16 rate, and an upper bound on that of float32."""


LIMITS = {"NVIDIA H200": Limits(4.3e12, 790e12)}
"""By name of the device: measured with PyTorch 2.11 and CUDA 13 on 8.6 GB and on 8192 x 8192 x 8192."""


def compulsory_bytes(case: Case) -> int:
    """Bytes of the arrays that a call reads and writes, each once for each pass that needs it."""
    sequence = case.batch * case.features * case.length * case.itemsize
    taps = case.features * case.length * 4
    if case.direction == "forward":
        return (4 if case.gated else 2) * sequence + taps  # u, gates; y
    # Forward as above; backward reads u, gates and the cotangent and writes a gradient of all but the last.
    return (11 if case.gated else 5) * sequence + 3 * taps


def fused_plan(length: int, *, ahead: bool = False) -> tuple[tuple[int, int], int] | None:
    """The factors that the fused kernel multiplies a block by and the number of blocks; None where three passes do it.

    `ahead` says whether there are taps on both sides of lag 0, as a circular convolution has.
    """
    for n2 in FUSED_SECOND_FACTORS:
        if length <= FUSED_FIRST_FACTOR * n2:
            return (FUSED_FIRST_FACTOR, n2), 1
    blocks = math.ceil(length / (FUSED_FIRST_FACTOR * FUSED_SECOND_FACTORS[-1]))
    return ((FUSED_FIRST_FACTOR, FUSED_SECOND_FACTORS[-1]), blocks) if blocks <= FUSED_BLOCKS[ahead] else None


def triton_plan(length: int) -> tuple[tuple[int, int], int] | None:
    """The same of the Triton kernels."""
    return next(((factors, 1) for factors in TRITON_FACTORS if length <= math.prod(factors)), None)


@functools.cache
def cheapest_plan(length: int, *, circular: bool = False) -> tuple[int, ...]:
    """The factors of the fewest FLOP: 2 to 4 powers of two, 16 to 256 each, whose product is the next from L up."""
    points = max(256, 1 << (length - 1).bit_length())
    sizes = [16, 32, 64, 128, 256]
    candidates = [
        factors[::-1]  # the largest first, where it costs half
        for order in (2, 3, 4)
        for factors in itertools.combinations_with_replacement(sizes, order)
        if math.prod(factors) == points
    ]
    if not candidates:
        raise ValueError(f"length must be at most {256**4}; got {length}.")
    return min(candidates, key=lambda factors: row_flop(factors, circular=circular))


def row_flop(factors: tuple[int, ...], *, circular: bool = False) -> int:
    """FLOP of one row, forward and back again through the transform."""
    first, rest = factors[0], sum(factors[1:])
    return math.prod(factors) * (8 * (first + rest) if circular else 8 * first + 16 * rest)


def plan_flop(case: Case, factors: tuple[int, ...], *, circular: bool) -> float:
    """FLOP of the whole call. The backward pass adds three half chains: u and cotangent forward, gradient of u back."""
    passes = 1.0 if case.direction == "forward" else 2.5
    return passes * case.batch * case.features * row_flop(factors, circular=circular)


def fft_flop(case: Case) -> float:
    """FLOP by the usual count for real FFTs, 5/2 N log2 N: two transforms of a row, five with the backward pass."""
    n = case.length if case.protocol == "circular" else 2 * case.length
    transforms = 2 if case.direction == "forward" else 5
    return transforms * 2.5 * n * math.log2(n) * case.batch * case.features


def memory_floor_ms(case: Case, limits: Limits) -> float:
    """Milliseconds to move the compulsory bytes."""
    return 1e3 * compulsory_bytes(case) / limits.bytes_per_second


def tensor_floor_ms(case: Case, limits: Limits) -> float:
    """Milliseconds to multiply by the blocks of the cheapest plan."""
    circular = case.protocol == "circular"
    factors = cheapest_plan(case.length, circular=circular)
    return 1e3 * plan_flop(case, factors, circular=circular) / limits.flop_per_second
