"""Measures of smoothness on signals for which they are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import smooth, squash
from flashbutterfly_jax.functional import high_frequency_share, total_variation

K = 256
NOISE = np.random.default_rng(0).standard_normal((64, K)).astype(np.float32)
T = np.arange(K)


@pytest.mark.parametrize(
    ("kernel", "want"),
    [
        (np.ones(K), 0),
        (np.zeros(K), 0),
        ([-3.0], 0),
        (T / 10, 2 / K),  # from 0 to K - 1, of sum K (K - 1) / 2
        ((T >= 100) & (T < 120), 2 / 20),
        (T == 7, 2),
        ((-1.0) ** T, 2 * (K - 1) / K),
        ([1.0, -2.0, 4.0], 9 / 7),
    ],
)
def test_total_variation_by_hand(kernel, want):
    np.testing.assert_allclose(total_variation(np.asarray(kernel, np.float32)), want, rtol=1e-6)


def test_total_variation_of_noise_is_the_root_of_two():
    """A difference has sqrt(2) times the deviation. Over 64 kernels of 256 taps the mean is known to about 0.01."""
    assert abs(total_variation(NOISE).mean() - np.sqrt(2)) < 0.02


@pytest.mark.parametrize("cutoff", [0.0, 0.25, 0.5, 0.9])
def test_a_single_tap_and_noise_are_white(cutoff):
    above = (np.abs(np.fft.fftfreq(2 * K)) * 2 > cutoff).mean()
    np.testing.assert_allclose(high_frequency_share(np.float32(T == 5), cutoff), above, rtol=1e-5)
    assert abs(above - (1 - cutoff)) <= 1 / K
    assert abs(high_frequency_share(NOISE, cutoff).mean() - above) < 0.02


def test_waves_are_where_they_are():
    waves = np.cos(np.pi * np.array([[0.1], [0.45], [0.55], [0.9]]) * T).astype(np.float32)
    share = high_frequency_share(waves)
    assert (share[:2] < 0.03).all()
    assert (share[2:] > 0.97).all()
    np.testing.assert_allclose(high_frequency_share(np.zeros((2, K), np.float32)), 0)


def test_the_whole_spectrum_is_counted():
    """Parseval: the parts below and above any cutoff add up to N times the energy of the taps."""
    with jax.enable_x64(True):
        kernel = NOISE[0].astype(np.float64)
        spectrum = np.abs(np.fft.fft(kernel, 2 * K)) ** 2
        assert abs(spectrum.sum() / (2 * K * np.square(kernel).sum()) - 1) < 1e-12
        for cutoff in (0.0, 0.3, 0.5, 0.99):
            want = spectrum[np.abs(np.fft.fftfreq(2 * K)) * 2 > cutoff].sum() / spectrum.sum()
            np.testing.assert_allclose(high_frequency_share(kernel, cutoff), want, rtol=1e-12)


@pytest.mark.parametrize("measure", [total_variation, high_frequency_share])
def test_neither_scale_nor_sign_matters_and_smoothing_lowers_them(measure):
    want = measure(NOISE)
    assert want.shape == (64,)
    for factor in (-1.0, 1e-6, 1e6):
        np.testing.assert_allclose(measure(factor * NOISE), want, rtol=1e-5)
    assert (measure(smooth(NOISE, 7)) < 0.5 * want).all()
    assert (measure(squash(NOISE, 0.0)) == want).all()
    assert measure(NOISE[None].astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("measure", [total_variation, high_frequency_share])
def test_refuses(measure):
    with pytest.raises(ValueError, match="kernel must have a real floating-point dtype; got int"):
        measure(np.ones(3, int))
    with pytest.raises(ValueError, match=r"kernel must have shape \(..., K\) with K >= 1; got shape \(2, 0\)"):
        measure(np.ones((2, 0), np.float32))


@pytest.mark.parametrize("cutoff", [-0.1, 1.0, float("nan")])
def test_refuses_a_cutoff_out_of_range(cutoff):
    with pytest.raises(ValueError, match=r"cutoff must be in \[0, 1\); got"):
        high_frequency_share(np.ones(3, np.float32), cutoff)
