"""`implementation="butterfly"` for long sequences, of awkward lengths too: values and gradients against NumPy's FFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import long_conv
from flashbutterfly_jax.functional.butterfly import fast_plan

TOLERANCE = 5e-15  # relative L2 error in float64; the largest here is 2.4e-15, NumPy's own included


def expected(u, g, kernel, reverse, *, circular):
    """y of one row, and the gradients of <g, y>, by FFTs of L or 2 L points, which NumPy factors in its own way."""
    length = u.size
    n = length if circular else 2 * length
    lags = np.arange(length)
    taps = np.zeros(n)
    np.add.at(taps, lags % n, kernel)
    np.add.at(taps, (-1 - lags)[: length if circular else length - 1] % n, reverse[: length if circular else -1])
    spectra = {name: np.fft.rfft(x, n) for name, x in {"u": u, "g": g, "taps": taps}.items()}
    y = np.fft.irfft(spectra["u"] * spectra["taps"], n)[:length]
    du = np.fft.irfft(spectra["g"] * spectra["taps"].conj(), n)[:length]
    by_lag = np.fft.irfft(spectra["g"] * spectra["u"].conj(), n)
    return {"y": y, "u": du, "kernel": by_lag[lags % n], "reverse": by_lag[(-1 - lags) % n]}


def check(length: int, *, circular: bool = False) -> None:
    u, g, kernel, reverse = np.random.default_rng(length).standard_normal((4, length))
    with jax.enable_x64(True):

        @jax.jit
        def values_and_gradients(g, *arrays):
            def convolve(u, kernel, reverse):
                options = {"reverse_kernel": reverse, "circular": circular, "implementation": "butterfly"}
                return long_conv(u, kernel, **options)

            y, pull_back = jax.vjp(convolve, *arrays)
            return y, *pull_back(g)

        got = values_and_gradients(*(jnp.asarray(x)[None] for x in (g, u, kernel, reverse)))
    want = expected(u, g, kernel, reverse, circular=circular)
    errors = {
        name: np.linalg.norm(np.asarray(x)[0] - want[name]) / np.linalg.norm(want[name])
        for (name, x) in zip(want, got, strict=True)
    }
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("length", [65537, 131072], ids=["prime", "power of two"])
def test_long_sequences(length):
    check(length)


def test_a_long_circle():
    check(2**16, circular=True)


def test_plans_of_long_sequences_have_small_blocks():
    """Dense products of 2^20 points cost what four blocks do, however awkward the length."""
    for length in (65521, 65537, 131071, 2**17, 2**20 - 1, 2**22 - 1):
        plan = fast_plan(length)
        assert length <= plan.n <= 1.14 * length
        assert max(plan.factors) <= 64
        assert plan.order >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "circular"),
    [(99999, False), (131071, False), (131071, True), (2**17, True), (2**20 - 3, False), (2**20, False)],
)
def test_longer_sequences(length, circular):
    check(length, circular=circular)
