"""Times `long_conv(implementation="xla")` against a convolution written by hand with `jnp.fft`, on this machine's CPU.

    python -m experiments.benchmarks.convolution_cpu

Prints milliseconds and their ratio for each length, forward and gradient, in about a minute on two CPU cores. The two
are run in turn, and a ratio is the median over the pairs, so that a busy machine disturbs both alike; the ratio of the
time spent on the CPU is disturbed the least. Expected: a ratio of 1 within its noise, since the work is three real
transforms either way, and six with the gradient. It says nothing about a GPU.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Callable
from typing import Literal

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX looks for devices: this is a CPU benchmark wherever it runs

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from flashbutterfly_jax import long_conv

type Pass = Literal["forward", "gradient"]
PASSES: tuple[Pass, ...] = ("forward", "gradient")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    lengths: tuple[int, ...] = (256, 1000, 1024, 4096, 16384, 65536)
    """Sequence lengths."""
    elements: int = 2**20
    """B * D * L at every length: features are fewer where sequences are longer."""
    batch: int = 4
    """Sequences per batch."""
    repeats: int = 21
    """Pairs of runs for each row."""


def by_hand(u: Float[Array, "B D L"], kernel: Float[Array, "D L"]) -> Float[Array, "B D L"]:
    """The causal convolution as most code writes it: everything padded to twice the length."""
    length = u.shape[-1]
    n = 2 * length
    return jnp.fft.irfft(jnp.fft.rfft(u, n) * jnp.fft.rfft(kernel, n), n)[..., :length]


def by_library(u: Float[Array, "B D L"], kernel: Float[Array, "D L"]) -> Float[Array, "B D L"]:
    """The same by the library."""
    return long_conv(u, kernel, implementation="xla")


def compiled(function: Callable, what: Pass, *arguments: Array) -> Callable:
    """The function, or the gradient of half its squared norm in both arguments, compiled."""
    if what == "forward":
        return jax.jit(function).lower(*arguments).compile()
    gradient = jax.grad(lambda *arguments: 0.5 * jnp.sum(function(*arguments) ** 2), argnums=(0, 1))
    return jax.jit(gradient).lower(*arguments).compile()


def time_in_turn(functions: tuple[Callable, ...], arguments: tuple[Array, ...], repeats: int) -> np.ndarray:
    """Seconds of each run on the clock and on the CPU, (2, functions, repeats). Every other round is in reverse."""
    for function in functions:
        jax.block_until_ready(function(*arguments))
    seconds = np.zeros((2, len(functions), repeats))
    for repeat in range(repeats):
        for which in range(len(functions))[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(functions[which](*arguments))
            seconds[:, which, repeat] = time.perf_counter() - start[0], time.process_time() - start[1]
    return seconds


def main(config: Config) -> None:
    """Times every length and prints the table."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table = Table(
        title=f"Causal convolution on CPU ({cores} cores, {platform.machine()}), float32, B = {config.batch}, "
        f"jax {jax.__version__}",
        caption=f"Ratios are library / by hand, medians of {config.repeats} pairs: of time, and of time on the CPU",
    )
    for column in ("L", "D", "pass", "by hand", "library", "ratio", "CPU ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    random = np.random.default_rng(0)
    for length in config.lengths:
        features = max(1, config.elements // (config.batch * length))
        u = jnp.asarray(random.standard_normal((config.batch, features, length)), jnp.float32)
        kernel = jnp.asarray(random.standard_normal((features, length)), jnp.float32)
        for what in PASSES:
            functions = tuple(compiled(function, what, u, kernel) for function in (by_hand, by_library))
            seconds = time_in_turn(functions, (u, kernel), config.repeats)
            hand, library = np.median(seconds[0], axis=-1)
            ratio, cpu_ratio = np.median(seconds[:, 1] / seconds[:, 0], axis=-1)
            milliseconds = (f"{1e3 * hand:.2f} ms", f"{1e3 * library:.2f} ms")
            table.add_row(str(length), str(features), what, *milliseconds, f"{ratio:.3f}", f"{cpu_ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
