"""Real FFTs and their transposes against NumPy and JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax.functional import spectral


def rfft(x, n):
    return spectral.rfft(x, n=n)[0]


def irfft(spectrum, n):
    return spectral.irfft(spectrum, n=n)[0]


SIZES = ((1, 1), (1, 2), (3, 4), (4, 4), (5, 5), (5, 9), (7, 16))


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize(("length", "n"), SIZES)
def test_transforms_and_transposes_are_those_of_numpy(length, n):
    with jax.enable_x64(True):
        x, spectrum = normal(2, length), normal(2, n // 2 + 1) + 1j * np.flip(normal(2, n // 2 + 1))
        np.testing.assert_allclose(rfft(jnp.asarray(x), n), np.fft.rfft(x, n), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(irfft(jnp.asarray(spectrum), n), np.fft.irfft(spectrum, n), rtol=1e-12, atol=1e-12)

        forward, back = (jax.linear_transpose(f, x) for f in (lambda x: rfft(x, n), lambda x: jnp.fft.rfft(x, n)))
        np.testing.assert_allclose(*(f(jnp.asarray(spectrum))[0] for f in (forward, back)), rtol=1e-12, atol=1e-12)
        ours, jaxs = (jax.linear_transpose(lambda s, f=f: f(s, n), spectrum) for f in (irfft, jnp.fft.irfft))
        y = jnp.asarray(normal(2, n))
        np.testing.assert_allclose(ours(y)[0], jaxs(y)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shapes", [[(0, 5)], [(2, 0, 5), (3, 5)], [(0, 3, 5), (0, 5)]], ids=str)
def test_nothing_is_transformed_to_nothing(shapes):
    spectra = spectral.rfft(*map(jnp.zeros, shapes), n=8)
    assert [spectrum.shape for spectrum in spectra] == [(*shape[:-1], 5) for shape in shapes]
    back = spectral.irfft(*spectra, n=8)
    assert [x.shape for x in back] == [(*shape[:-1], 8) for shape in shapes]


def test_transposing_twice_is_the_identity():
    with jax.enable_x64(True):
        x = jnp.asarray(normal(3, 6))

        def transpose(f, like):
            return lambda y: jax.linear_transpose(f, like)(y)[0]

        once = transpose(lambda x: rfft(x, 9), x)
        twice = transpose(once, rfft(x, 9))
        np.testing.assert_allclose(twice(x), rfft(x, 9), rtol=1e-12)


def test_transposes_are_real_transforms():
    x = jnp.ones((2, 8))
    for function, argument in ((lambda x: rfft(x, 16), x), (lambda s: irfft(s, 16), rfft(x, 16))):
        transpose = jax.linear_transpose(function, argument)
        text = jax.jit(transpose).lower(function(argument)).as_text()
        assert text.count("stablehlo.fft") == 1
        assert text.count("RFFT") == 1  # IRFFT too


def test_transforms_run_without_jit_in_any_position_of_a_batch_axis():
    x = jnp.asarray(normal(3, 4, 5), jnp.float32)
    for axis in range(3):
        moved = jnp.moveaxis(x, 0, axis)
        got = jax.vmap(lambda x: irfft(rfft(x, 10), 10)[..., :5], in_axes=axis)(moved)
        np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)
