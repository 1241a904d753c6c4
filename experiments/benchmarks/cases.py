"""One convolution to time: its shape, its random inputs, and what it should give in float64."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

type Protocol = Literal["causal", "circular"]
type Direction = Literal["forward", "forward+backward"]
type Dtype = Literal["bfloat16", "float16", "float32"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol.__value__)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction.__value__)
DTYPES: tuple[Dtype, ...] = get_args(Dtype.__value__)


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution of (batch, features, length) with as many taps, which are float32 as parameters are."""

    protocol: Protocol
    length: int
    dtype: Dtype
    direction: Direction
    gated: bool
    batch: int
    features: int

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the convolution is called with, and differentiated in."""
        return ("u", "kernel", "pre_gate", "post_gate") if self.gated else ("u", "kernel")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arguments, and the cotangent of y where there is a backward pass."""
        return self.arguments if self.direction == "forward" else (*self.arguments, "cotangent")

    @property
    def sampled_features(self) -> np.ndarray:
        """Features whose results are compared: few, of every row of the batch, over which the taps' gradient sums."""
        return np.unique([0, self.features // 2, self.features - 1])


type Inputs = dict[str, jax.Array]


def random_inputs(case: Case, seed: int) -> Inputs:
    """Standard normal numbers; taps divided by sqrt(L), so that y is of the size of u."""

    def draw(name: str, key: jax.Array) -> jax.Array:
        if name == "kernel":
            return jax.random.normal(key, (case.features, case.length), jnp.float32) * case.length**-0.5
        return jax.random.normal(key, (case.batch, case.features, case.length), case.dtype)

    keys = jax.random.split(jax.random.key(seed), len(case.inputs))
    return jax.block_until_ready({name: draw(name, key) for name, key in zip(case.inputs, keys, strict=True)})


def reference(case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    """Every result of the sampled features in float64, from the inputs as they are after rounding to their dtype."""
    f = case.sampled_features
    a = {name: np.asarray(x[..., f, :]).astype(np.float64) for name, x in inputs.items()}
    n = case.length if case.protocol == "circular" else 2 * case.length

    def spectrum(x: np.ndarray) -> np.ndarray:
        return np.fft.rfft(x, n)

    def back(x: np.ndarray) -> np.ndarray:
        return np.fft.irfft(x, n)[..., : case.length]

    pre, post = a.get("pre_gate", 1.0), a.get("post_gate", 1.0)
    taps, gated = spectrum(a["kernel"]), spectrum(a["u"] * pre)
    convolved = back(gated * taps)
    results = {"y": convolved * post}
    if case.direction == "forward":
        return results
    g = spectrum(a["cotangent"] * post)
    d_gated = back(g * taps.conj())
    results |= {"u": d_gated * pre, "kernel": back((g * gated.conj()).sum(0))}
    if case.gated:
        results |= {"pre_gate": d_gated * a["u"], "post_gate": a["cotangent"] * convolved}
    return results


def relative_errors(results: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """||x - reference|| / ||reference|| of y, and of the gradient in each argument under the argument's name."""
    return {
        name: float(np.linalg.norm(results[name].astype(np.float64) - right) / np.linalg.norm(right))
        for name, right in expected.items()
    }
