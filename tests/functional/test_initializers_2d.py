"""The initialiser of kernels of images decays from the pixel on, along both axes, at each feature's rate."""

import jax
import numpy as np
import pytest

from flashbutterfly_jax.initializers import geometric_decay_2d


def test_decays_along_both_axes():
    """In units of its noise: kernels of the same key and another scale have the same noise."""
    shape, key = (3, 4, 5, 6), jax.random.key(0)
    rate = 2.0 ** (np.arange(4) / 4)[:, None, None]
    i, j = np.arange(5)[:, None] / 5, np.arange(6) / 6
    want = 0.02 * np.exp(-rate * (i + j)) * np.asarray(jax.random.normal(key, shape))
    np.testing.assert_allclose(geometric_decay_2d()(key, shape), want, rtol=2e-6)
    np.testing.assert_allclose(geometric_decay_2d(0.5)(key, shape), 25 * want, rtol=2e-6)


def test_refuses_kernels_of_sequences():
    with pytest.raises(ValueError, match=r"shape must end in \(D, Kh, Kw\), at least three axes; got \(4, 16\)"):
        geometric_decay_2d()(jax.random.key(0), (4, 16))
