"""The convolutions that JAX runs: ours by name, and the one that a user writes with `jnp.fft`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.benchmarks.cases import Case, Inputs
from flashbutterfly_jax import long_conv
from pallas_kernels.timing import Round, host_round

OURS = ("mosaic_gpu", "triton", "xla", "butterfly")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An implementation that is ready to be timed on one case."""

    round: Round
    results: Callable[[], dict[str, np.ndarray]]
    """y, and the gradients under their arguments' names, of the sampled features."""
    temporary_bytes: int | None
    """Device memory beyond inputs and outputs. XLA's does not count what cuFFT takes for itself while it runs."""


def by_hand(
    u: Float[Array, "B D L"],
    kernel: Float[Array, "D L"],
    pre_gate: Float[Array, "B D L"] | None = None,
    post_gate: Float[Array, "B D L"] | None = None,
    *,
    circular: bool,
) -> Float[Array, "B D L"]:
    """The convolution as most code writes it: float32, everything padded to twice the length unless it may wrap."""
    length = u.shape[-1]
    n = length if circular else 2 * length
    x = (u if pre_gate is None else u * pre_gate).astype(jnp.float32)
    y = jnp.fft.irfft(jnp.fft.rfft(x, n) * jnp.fft.rfft(kernel, n), n)[..., :length]
    return (y if post_gate is None else y * post_gate).astype(u.dtype)


def by_library(
    u: Float[Array, "B D L"],
    kernel: Float[Array, "D L"],
    pre_gate: Float[Array, "B D L"] | None = None,
    post_gate: Float[Array, "B D L"] | None = None,
    *,
    circular: bool,
    implementation: Any,
) -> Float[Array, "B D L"]:
    """The same by the library."""
    return long_conv(
        u, kernel, circular=circular, pre_gate=pre_gate, post_gate=post_gate, implementation=implementation
    )


def prepare(name: str, case: Case, sets: Sequence[Inputs]) -> Prepared:
    """Compiles an implementation for a case.

    Raises:
      NotImplementedError: if it does not support the case.
    """
    circular = case.protocol == "circular"
    if name == "jnp_fft":
        convolution = functools.partial(by_hand, circular=circular)
    else:
        convolution = functools.partial(by_library, circular=circular, implementation=name)

    def forward(inputs: Inputs) -> dict[str, Array]:
        return {"y": convolution(*(inputs[argument] for argument in case.arguments))}

    def both(inputs: Inputs) -> dict[str, Array]:
        y, transposed = jax.vjp(convolution, *(inputs[argument] for argument in case.arguments))
        gradients = transposed(inputs["cotangent"])
        return {"y": y} | dict(zip(case.arguments, gradients, strict=True))

    compiled = jax.jit(forward if case.direction == "forward" else both).lower(sets[0]).compile()
    memory = compiled.memory_analysis()

    def results() -> dict[str, np.ndarray]:
        f = case.sampled_features
        return {key: np.asarray(x[..., f, :]).astype(np.float64) for key, x in compiled(sets[0]).items()}

    return Prepared(
        round=host_round(compiled, sets, jax.block_until_ready),
        results=results,
        temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
    )
