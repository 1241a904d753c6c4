"""One suite for every implementation of the long convolution: subclass `ParitySuite` and name the implementation.

The oracle is a direct sum over the taps in NumPy float64, O(L K), with its vector-Jacobian product written out.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import long_conv
from tests import tolerances

MODES = {
    "causal": {"bidirectional": False, "circular": False},
    "bidirectional": {"bidirectional": True, "circular": False},
    "circular": {"bidirectional": False, "circular": True},
    "circular-bidirectional": {"bidirectional": True, "circular": True},
}
# L, K: tiny, odd, prime, powers of two, one over and one under; K shorter, equal, longer, much longer than L
SHAPES = ((1, 1), (1, 5), (2, 2), (3, 2), (5, 13), (16, 16), (17, 17), (97, 101), (100, 301), (255, 256), (256, 255))
CIRCULAR_SHAPES = ((1, 3), (2, 5), (16, 16), (17, 33), (64, 7), (97, 101))
GATES = ((False, None), (True, None), (False, "shared"), (True, "shared"), (True, "own"))
SKIPS_AND_CHANNELS = ((False, None), (True, None), (True, 1), (False, 2), (True, 3))


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, without its numbers."""

    length: int
    taps: int
    bidirectional: bool = False
    circular: bool = False
    channels: int | None = None
    skip: bool = False
    pre_gate: bool = False
    post_gate: str | None = None  # "shared" by the channels or "own"
    batch: tuple[int, ...] = (2,)
    features: int = 3

    def __str__(self) -> str:
        mode = "circular" * self.circular + "-" * (self.circular and self.bidirectional)
        mode = mode + "bidirectional" * self.bidirectional or "causal"
        channels = "" if self.channels is None else f"-C{self.channels}"
        gates = "-pre" * self.pre_gate + (f"-post_{self.post_gate}" if self.post_gate else "")
        batch = "x".join(map(str, self.batch)) or "none"
        return f"{mode}-L{self.length}-K{self.taps}-B{batch}-D{self.features}{channels}{'-skip' * self.skip}{gates}"

    def arguments(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Its arrays in float64, but of values that float16 represents exactly, so that every dtype gets the same."""
        random = np.random.default_rng(seed)

        def normal(*shape):
            return random.standard_normal(shape).astype(np.float16).astype(np.float64)

        channels = () if self.channels is None else (self.channels,)
        sequence = (*self.batch, self.features, self.length)
        arrays = {"u": normal(*sequence), "kernel": normal(*channels, self.features, self.taps)}
        if self.skip:
            arrays["skip"] = normal(*channels, self.features)
        if self.bidirectional:
            arrays["reverse_kernel"] = normal(*arrays["kernel"].shape)
        if self.pre_gate:
            arrays["pre_gate"] = normal(*sequence)
        if self.post_gate:
            own = self.post_gate == "own"
            arrays["post_gate"] = normal(*self.batch, *(channels if own else ()), self.features, self.length)
        return arrays


def _cases() -> tuple[Case, ...]:
    """Every mode with every gate, skip and channel count, paired differently in each; every mode with every shape."""
    cases = [Case(12, 12, batch=batch, features=features) for batch, features in (((), 1), ((1,), 2), ((2, 3), 4))]
    for turn, mode in enumerate(MODES.values()):
        for i, (pre_gate, post_gate) in enumerate(GATES):
            skip, channels = SKIPS_AND_CHANNELS[(i + turn) % len(SKIPS_AND_CHANNELS)]
            cases.append(Case(24, 20, **mode, channels=channels, skip=skip, pre_gate=pre_gate, post_gate=post_gate))
        for length, taps in CIRCULAR_SHAPES if mode["circular"] else SHAPES:
            cases.append(Case(length, taps, **mode, channels=2, skip=True, pre_gate=True, post_gate="shared"))
    cases.append(Case(1024, 1024, bidirectional=True, skip=True))
    return tuple(cases)


CASES = _cases()
# Lengths have been seen in float64, which shows the smallest error, in every mode: in float32 one mode is enough.
ONE_MODE = [case for case in CASES if case.length in (12, 24, 1024) or not (case.bidirectional or case.circular)]
REPEATED = [pytest.param(case, "float32", marks=pytest.mark.slow) for case in CASES if case not in ONE_MODE]
CASES_BY_DTYPE = [*((case, "float32") for case in ONE_MODE), *REPEATED, *((case, "float64") for case in CASES)]


def _lags(taps: int, reverse_taps: int):
    """Each lag with the name of its kernel and the index of its tap."""
    yield from ((lag, "kernel", lag) for lag in range(taps))
    yield from ((-1 - tap, "reverse_kernel", tap) for tap in range(reverse_taps))


def _shift(x: np.ndarray, lag: int, circular: bool) -> np.ndarray:
    """x[t - lag], which is zero outside the sequence unless circular."""
    shifted = np.roll(x, lag, axis=-1)
    if not circular:
        shifted[..., : max(lag, 0)] = 0
        shifted[..., max(x.shape[-1] + lag, 0) if lag < 0 else x.shape[-1] :] = 0
    return shifted


def direct_sum(u, kernel, skip=None, *, reverse_kernel=None, circular=False, pre_gate=None, post_gate=None):
    """The long convolution as its definition has it, one tap after the other."""
    x = u if pre_gate is None else pre_gate * u
    if kernel.ndim == 3:
        x = x[..., None, :, :]
        if post_gate is not None and post_gate.ndim == u.ndim:
            post_gate = post_gate[..., None, :, :]
    y = np.zeros((*x.shape[: -kernel.ndim], *kernel.shape[:-1], x.shape[-1]))
    if skip is not None:
        y += skip[..., None] * x
    kernels = {"kernel": kernel, "reverse_kernel": reverse_kernel}
    for lag, name, tap in _lags(kernel.shape[-1], 0 if reverse_kernel is None else reverse_kernel.shape[-1]):
        y += kernels[name][..., tap, None] * _shift(x, lag, circular)
    return y if post_gate is None else post_gate * y


def direct_gradients(cotangent, u, kernel, skip=None, **options):
    """The gradient of sum(cotangent * direct_sum(...)) in each array, by name."""
    circular, pre_gate, post_gate = options.get("circular", False), options.get("pre_gate"), options.get("post_gate")
    gradients = {}
    if post_gate is not None:
        ungated = direct_sum(u, kernel, skip, **options | {"post_gate": None})
        shared = kernel.ndim == 3 and post_gate.ndim == u.ndim
        gradients["post_gate"] = (cotangent * ungated).sum(-3) if shared else cotangent * ungated
        cotangent = cotangent * (post_gate[..., None, :, :] if shared else post_gate)
    x = u if pre_gate is None else pre_gate * u
    x = x[..., None, :, :] if kernel.ndim == 3 else x
    batch = tuple(range(cotangent.ndim - kernel.ndim))
    dx = np.zeros(cotangent.shape)
    if skip is not None:
        gradients["skip"] = (cotangent * x).sum((*batch, -1))
        dx += skip[..., None] * cotangent
    kernels = {"kernel": kernel, "reverse_kernel": options.get("reverse_kernel")}
    kernels = {name: array for name, array in kernels.items() if array is not None}
    gradients |= {name: np.zeros(array.shape) for name, array in kernels.items()}
    for lag, name, tap in _lags(kernel.shape[-1], kernel.shape[-1] if "reverse_kernel" in kernels else 0):
        gradients[name][..., tap] = (cotangent * _shift(x, lag, circular)).sum((*batch, -1))
        dx += kernels[name][..., tap, None] * _shift(cotangent, -lag, circular)
    dx = dx.sum(-3) if kernel.ndim == 3 else dx
    gradients["u"] = dx if pre_gate is None else pre_gate * dx
    if pre_gate is not None:
        gradients["pre_gate"] = u * dx
    return gradients


def relative_error(got, want) -> float:
    """max |got - want| / max |want|, in float64."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    assert np.isfinite(got).all()
    scale = np.abs(want).max(initial=0.0)
    return float(np.abs(got - want).max(initial=0.0) / scale) if scale else float(np.abs(got).max(initial=0.0))


def cast(arrays: dict[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    """As JAX arrays, u and its gates of this dtype; kernels and skip too, but of float32 where that is wider."""
    kernel_dtype = jnp.promote_types(dtype, jnp.float32)
    kernels = ("kernel", "reverse_kernel", "skip")
    return {name: jnp.asarray(array, kernel_dtype if name in kernels else dtype) for name, array in arrays.items()}


class ParitySuite:
    """Values and gradients of one implementation against the direct sum."""

    implementation: ClassVar[str]

    def unsupported(self, case: Case, dtype: str) -> str | None:
        """Why this implementation must raise NotImplementedError for the case, if it must: a match for the message."""
        return None

    @pytest.mark.parametrize(("case", "dtype"), CASES_BY_DTYPE, ids=str)
    def test_values_and_gradients(self, case, dtype):
        self.check(case, dtype)

    @pytest.mark.parametrize("case", [case for case in CASES if case.length == 24 and not case.circular], ids=str)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_sixteen_bit_sequences_with_float32_kernels(self, case, dtype):
        self.check(case, dtype)

    def check(self, case: Case, dtype: str) -> None:
        with jax.enable_x64(dtype == "float64"):
            arrays = cast(case.arguments(), dtype)

            def convolve(arrays):
                return long_conv(**arrays, circular=case.circular, implementation=self.implementation)

            if reason := self.unsupported(case, dtype):
                with pytest.raises(NotImplementedError, match=reason):
                    convolve(arrays)
                return
            exact = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
            want = direct_sum(**exact, circular=case.circular)
            cotangent = np.random.default_rng(1).standard_normal(want.shape).astype(np.float16)

            def values_and_gradients(arrays, cotangent):
                y, pull_back = jax.vjp(convolve, arrays)
                return y, pull_back(cotangent)[0]

            y, gradients = jax.jit(values_and_gradients)(arrays, jnp.asarray(cotangent, dtype))
            assert y.dtype == dtype
            assert relative_error(y, want) < tolerances.FORWARD[self.implementation][dtype]

            cotangent = np.asarray(jnp.asarray(cotangent, dtype), np.float64)
            wanted = direct_gradients(cotangent, **exact, circular=case.circular)
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                assert gradient.dtype == arrays[name].dtype, name
                tolerance = tolerances.GRADIENT[self.implementation][str(gradient.dtype)]
                assert relative_error(gradient, wanted[name]) < tolerance, name
