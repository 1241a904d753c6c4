"""The initialisers against the figures known for the paper's code."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import initializers, smooth, squash
from flashbutterfly_jax.initializers import alive_fraction, warn_if_mostly_squashed

SHAPE = (2, 256, 1024)


@pytest.mark.parametrize(
    ("init", "threshold", "alive"),
    [
        (initializers.random(), 0.001, 0.617),
        (initializers.random(), 0.002, 0.317),
        (initializers.random(), 0.003, 0.134),
        (initializers.random(), 0.004, 0.046),  # 0.0455
        (initializers.geometric_decay(), 0.001, 0.36),
        (initializers.geometric_decay(), 0.003, 0.25),
    ],
    ids=str,
)
def test_the_fraction_alive_is_the_known_one_and_that_of_a_sample(init, threshold, alive):
    predicted = alive_fraction(init, threshold, SHAPE)
    assert predicted == pytest.approx(alive, abs=0.006)
    kernel = init(jax.random.key(0), SHAPE)
    assert float(jnp.mean(squash(kernel, threshold) != 0)) == pytest.approx(predicted, abs=0.003)


@pytest.mark.parametrize("init", [initializers.random(), initializers.geometric_decay()], ids=str)
@pytest.mark.parametrize("width", [3, 7])
@pytest.mark.parametrize("taps", [5, 512])
def test_the_fraction_alive_after_smoothing_is_that_of_a_sample(init, width, taps):
    shape = (32, 16, taps)
    kernel = smooth(init(jax.random.key(0), shape), width)
    predicted = alive_fraction(init, 0.001, shape, smooth_width=width)
    error = 5 * 0.5 / np.sqrt(np.prod(shape) / width)  # five standard deviations, neighbours being dependent
    assert float(jnp.mean(jnp.abs(kernel) > 0.001)) == pytest.approx(predicted, abs=error)


def test_geometric_decay_is_the_formula_tap_by_tap():
    features, taps = 5, 7
    scale = initializers.geometric_decay(0.5).tap_scale((3, features, taps))
    for i in range(features):
        for j in range(taps):
            want = 0.5 * np.exp(-(j / taps) * int(features / 2) ** (i / features))
            assert scale[i, j] == pytest.approx(want, rel=1e-12)


def test_known_rates_of_geometric_decay():
    scale = initializers.geometric_decay(1.0).tap_scale((256, 100_000))
    assert scale[0, -1] == pytest.approx(np.exp(-1), rel=1e-4)
    assert -np.log(scale[-1, 1000]) / 0.01 == pytest.approx(125.6, abs=0.05)


@pytest.mark.parametrize("name", ["random", "geometric_decay"])
def test_samples_have_the_scale_they_claim(name):
    init = getattr(initializers, name)()
    kernel = init(jax.random.key(0), (4000, 3, 4))
    measured = jnp.sqrt(jnp.mean(kernel**2, axis=0))
    np.testing.assert_allclose(measured, np.broadcast_to(init.tap_scale((3, 4)), (3, 4)), rtol=0.06)
    assert jnp.abs(jnp.mean(kernel)) < 5 * 0.02 / np.sqrt(kernel.size)


@pytest.mark.parametrize("name", ["random", "geometric_decay"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (2, 3, 5), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(name, shape, dtype):
    init = getattr(initializers, name)()
    assert init == type(init)(init.scale)
    assert hash(init) == hash(type(init)(init.scale))
    kernel = jax.jit(init, static_argnums=(1, 2))(jax.random.key(0), shape, dtype)
    assert (kernel.shape, kernel.dtype) == (shape, dtype)
    assert jnp.isfinite(kernel).all()


@pytest.mark.parametrize("name", ["random", "geometric_decay"])
def test_a_shape_without_features_is_refused(name):
    with pytest.raises(ValueError, match=r"shape must end in \(D, K\), at least two axes; got \(5,\)"):
        getattr(initializers, name)()(jax.random.key(0), (5,))


def test_the_default_threshold_of_the_papers_code_is_warned_about():
    with pytest.warns(UserWarning, match=r"threshold of 0.1 leaves 0.00% of the taps of random\(scale=0.002\) alive"):
        warn_if_mostly_squashed(initializers.random(), 0.1, SHAPE)


@pytest.mark.parametrize(("threshold", "warned"), [(0.005, False), (0.0053, True)])
def test_the_warning_starts_at_one_percent(threshold, warned):
    """erfc(0.0051517 / 0.002 / sqrt(2)) is 1 %."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        warn_if_mostly_squashed(initializers.random(), threshold, SHAPE)
    assert bool(caught) is warned


def test_smoothing_counts_for_the_warning():
    """A moving average over 7 taps leaves 0.38 of the scale."""
    warn_if_mostly_squashed(initializers.random(), 0.003, SHAPE)
    with pytest.warns(UserWarning, match="smoothing width 7"):
        warn_if_mostly_squashed(initializers.random(), 0.003, SHAPE, smooth_width=7)


def test_an_initialiser_of_unknown_scale_is_not_judged():
    warn_if_mostly_squashed(jax.nn.initializers.zeros, 0.1, SHAPE)


def test_a_threshold_of_zero_kills_nothing():
    assert alive_fraction(initializers.random(), 0.0, SHAPE) == 1.0
