"""The fused kernel's errors against float64: every mode, dtype, direction and class of lengths, beside the tolerance.

    python -m tests.kernels.parity_table

measures them in the interpreter, a quarter of an hour on one core, and prints `MEASURED` anew.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashbutterfly_jax import long_conv
from tests import tolerances
from tests.kernels.interpreter import interpreted
from tests.parity import Case, cast, direct_gradients, direct_sum

DTYPES = ("bfloat16", "float16", "float32")
DIRECTIONS = ("forward", "gradients")
MODES: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"bidirectional": True},
    "circular": {"circular": True},
    "gated": {"pre_gate": True, "post_gate": "shared"},
    "two channels": {"channels": 2},
    "all at once": {
        "circular": True,
        "bidirectional": True,
        "channels": 2,
        "pre_gate": True,
        "post_gate": "own",
    },
}
# Kernels are for at most 1024, 2048 and 4096 steps, and by blocks of 4096 steps for four of them.
LENGTHS = {"tiny": 3, "odd": 999, "prime": 2039, "power": 1024, "one over": 2049, "block": 4096, "largest": 16384}
"""Class -> steps, with as many taps."""

# In units of 1e-3: relative L2 errors, of the gradients the largest. Measured in the interpreter, three rows of one
# feature; float32 sequences are rounded to bfloat16, which adds an error of u's own.
MEASURED = """
mode          | dtype    | direction | tolerance |  tiny |   odd | prime | power | one over | block | largest
causal        | bfloat16 | forward   |      7.00 |  1.50 |  4.67 |  4.90 |  4.66 |     3.67 |  4.75 |    5.17
causal        | bfloat16 | gradients |      7.00 |  1.90 |  4.67 |  4.73 |  4.71 |     3.64 |  4.86 |    5.12
causal        | float16  | forward   |      2.50 |  0.21 |  0.56 |  0.59 |  0.58 |     0.45 |  0.60 |    0.63
causal        | float16  | gradients |      2.50 |  0.26 |  0.57 |  0.58 |  0.59 |     0.44 |  0.59 |    0.63
causal        | float32  | forward   |      7.00 |  2.69 |  5.00 |  5.16 |  4.93 |     4.00 |  5.07 |    5.43
causal        | float32  | gradients |      7.00 |  3.09 |  4.99 |  5.03 |  5.04 |     3.98 |  5.15 |    5.38
bidirectional | bfloat16 | forward   |      7.00 |  1.93 |  4.85 |  4.78 |  4.58 |     3.61 |  4.78 |    5.40
bidirectional | bfloat16 | gradients |      7.00 |  1.96 |  4.89 |  4.80 |  4.88 |     3.67 |  4.89 |    5.37
bidirectional | float16  | forward   |      2.50 |  0.27 |  0.57 |  0.59 |  0.57 |     0.44 |  0.59 |    0.65
bidirectional | float16  | gradients |      2.50 |  0.29 |  0.58 |  0.58 |  0.57 |     0.43 |  0.60 |    0.66
bidirectional | float32  | forward   |      7.00 |  2.51 |  5.15 |  5.05 |  4.88 |     3.98 |  5.08 |    5.65
bidirectional | float32  | gradients |      7.00 |  3.08 |  5.21 |  5.07 |  5.09 |     3.99 |  5.19 |    5.62
circular      | bfloat16 | forward   |      7.00 |  1.67 |  4.59 |  4.74 |  4.78 |     3.71 |  4.80 |    5.36
circular      | bfloat16 | gradients |      7.00 |  2.18 |  4.73 |  4.80 |  4.80 |     3.63 |  4.80 |    5.37
circular      | float16  | forward   |      2.50 |  0.24 |  0.58 |  0.60 |  0.58 |     0.45 |  0.61 |    0.66
circular      | float16  | gradients |      2.50 |  0.27 |  0.57 |  0.58 |  0.58 |     0.43 |  0.60 |    0.66
circular      | float32  | forward   |      7.00 |  2.47 |  4.92 |  5.03 |  5.02 |     4.03 |  5.10 |    5.61
circular      | float32  | gradients |      7.00 |  3.51 |  4.98 |  5.11 |  5.08 |     3.94 |  5.06 |    5.63
gated         | bfloat16 | forward   |      7.00 |  1.71 |  5.02 |  5.28 |  5.21 |     3.97 |  5.31 |    5.41
gated         | bfloat16 | gradients |      7.00 |  3.08 |  5.33 |  5.41 |  5.51 |     4.23 |  5.57 |    5.59
gated         | float16  | forward   |      2.50 |  0.15 |  0.59 |  0.66 |  0.59 |     0.49 |  0.62 |    0.65
gated         | float16  | gradients |      2.50 |  0.47 |  0.65 |  0.66 |  0.65 |     0.54 |  0.68 |    0.69
gated         | float32  | forward   |      7.00 |  3.04 |  5.88 |  6.22 |  5.91 |     4.99 |  6.03 |    6.17
gated         | float32  | gradients |      7.00 |  5.83 |  5.94 |  6.23 |  6.40 |     5.22 |  6.24 |    6.34
two channels  | bfloat16 | forward   |      7.00 |  1.63 |  5.00 |  5.17 |  4.89 |     3.88 |  5.10 |    5.17
two channels  | bfloat16 | gradients |      7.00 |  2.69 |  5.07 |  5.13 |  5.09 |     4.11 |  5.18 |    5.45
two channels  | float16  | forward   |      2.50 |  0.21 |  0.60 |  0.63 |  0.61 |     0.47 |  0.62 |    0.63
two channels  | float16  | gradients |      2.50 |  0.33 |  0.63 |  0.64 |  0.65 |     0.50 |  0.64 |    0.66
two channels  | float32  | forward   |      7.00 |  2.66 |  5.29 |  5.42 |  5.17 |     4.22 |  5.39 |    5.43
two channels  | float32  | gradients |      7.00 |  2.89 |  5.40 |  5.40 |  5.36 |     4.44 |  5.17 |    5.40
all at once   | bfloat16 | forward   |      7.00 |  2.10 |  5.22 |  5.37 |  5.37 |     4.14 |  5.41 |    5.66
all at once   | bfloat16 | gradients |      7.00 |  2.40 |  5.59 |  5.69 |  5.79 |     4.37 |  5.49 |    5.86
all at once   | float16  | forward   |      2.50 |  0.24 |  0.64 |  0.69 |  0.65 |     0.50 |  0.67 |    0.69
all at once   | float16  | gradients |      2.50 |  0.51 |  0.69 |  0.71 |  0.71 |     0.56 |  0.70 |    0.76
all at once   | float32  | forward   |      7.00 |  2.41 |  5.98 |  6.15 |  6.25 |     5.07 |  6.18 |    6.38
all at once   | float32  | gradients |      7.00 |  3.87 |  6.38 |  6.44 |  6.52 |     5.28 |  6.24 |    6.30
"""


def tolerance(dtype: str) -> float:
    """That of results and gradients for sequences of this dtype."""
    return tolerances.FUSED["float16" if dtype == "float16" else "bfloat16"]


def measured() -> dict[tuple[str, str, str, str], float]:
    """(mode, dtype, direction, class) -> error, from the table."""
    found = {}
    for line in MEASURED.strip().splitlines()[1:]:
        mode, dtype, direction, _, *errors = (cell.strip() for cell in line.split("|"))
        for name, error in zip(LENGTHS, errors, strict=True):
            found[mode, dtype, direction, name] = 1e-3 * float(error)
    return found


def case(mode: str, name: str, **sizes: Any) -> Case:
    """The convolution of a mode and a class of lengths."""
    features = 6 if name == "tiny" else 1  # a gradient of three numbers alone may happen to be near zero
    return Case(LENGTHS[name], LENGTHS[name], **MODES[mode], **{"batch": (3,), "features": features} | sizes)


def relative_error(got, want) -> float:
    """|got - want| / |want| in L2 norm, in float64."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def values_and_gradients(convolve: Callable[..., jax.Array], arrays, cotangent):
    """y, and by name the gradient of sum(cotangent y) in each array."""
    y, pull_back = jax.vjp(lambda arrays: convolve(**arrays), arrays)
    return y, pull_back(cotangent)[0]


def errors(case: Case, dtype: str, convolve: Callable[..., jax.Array] | None = None) -> dict[str, float]:
    """The errors of y and, by name, of each gradient, in one interpreted program, whose kernels are compiled once."""
    arrays = cast(case.arguments(), dtype)
    convolve = convolve or functools.partial(long_conv, circular=case.circular, implementation="mosaic_gpu")
    exact = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    want = direct_sum(**exact, circular=case.circular)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(want.shape), dtype)
    with interpreted():
        y, gradients = jax.jit(functools.partial(values_and_gradients, convolve))(arrays, cotangent)
    assert y.dtype == dtype
    wanted = direct_gradients(np.asarray(cotangent, np.float64), **exact, circular=case.circular)
    assert gradients.keys() == wanted.keys()
    assert all(gradient.dtype == arrays[name].dtype for name, gradient in gradients.items())
    return {"y": relative_error(y, want)} | {name: relative_error(g, wanted[name]) for name, g in gradients.items()}


def by_direction(errors: dict[str, float]) -> dict[str, float]:
    """The error of y, and the largest of the gradients'."""
    return {"forward": errors["y"], "gradients": max(error for name, error in errors.items() if name != "y")}


def _width(name: str) -> int:
    return max(5, len(name))


def rows() -> Iterator[str]:
    """The lines of `MEASURED`."""
    yield " | ".join(
        ["mode         ", "dtype   ", "direction", "tolerance", *(f"{name:>{_width(name)}}" for name in LENGTHS)]
    )
    for mode, dtype in itertools.product(MODES, DTYPES):
        found = [by_direction(errors(case(mode, name), dtype)) for name in LENGTHS]
        for direction in DIRECTIONS:
            figures = (f"{1e3 * each[direction]:{_width(name)}.2f}" for name, each in zip(LENGTHS, found, strict=True))
            yield " | ".join([f"{mode:13}", f"{dtype:8}", f"{direction:9}", f"{1e3 * tolerance(dtype):9.2f}", *figures])


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
