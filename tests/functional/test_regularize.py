"""Squash, smoothing and kernel dropout against hand-computed values and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import kernel_dropout, long_conv, smooth, smooth_frequency, squash

KERNEL = np.random.default_rng(0).standard_normal((2, 3, 17)).astype(np.float32)


def test_squash_by_hand():
    kernel = jnp.array([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, jnp.inf, jnp.nan])
    want = [-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, np.inf, np.nan]
    np.testing.assert_array_equal(squash(kernel, 1.0), want)
    np.testing.assert_array_equal(jax.jit(squash)(kernel, 1.0), want)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_the_gradient_of_squash_is_one_above_the_threshold_and_zero_elsewhere(transform):
    kernel = jnp.array([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    gradient = transform(jax.grad(lambda kernel, threshold: squash(kernel, threshold).sum(), argnums=(0, 1)))
    by_kernel, by_threshold = gradient(kernel, 1.0)
    np.testing.assert_array_equal(by_kernel, [1, 0, 0, 0, 0, 0, 1])
    assert by_threshold == 1 - 1


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_a_zero_threshold_is_the_identity_with_its_gradient(transform):
    kernel = jnp.array([-1.0, 0.0, 2.0, jnp.nan])
    np.testing.assert_array_equal(transform(squash)(kernel, 0.0), kernel)
    gradient = transform(jax.grad(lambda kernel, threshold: squash(kernel, threshold).sum()))(kernel, 0.0)
    np.testing.assert_array_equal(gradient, [1, 1, 1, 1])


@pytest.mark.parametrize("width", [1, 3, 7, 17, 35, 41])
def test_smooth_is_a_moving_average_with_zeros_outside(width):
    want = np.apply_along_axis(lambda taps: np.convolve(taps, np.ones(width), "full"), -1, KERNEL) / width
    want = want[..., width // 2 : width // 2 + KERNEL.shape[-1]]
    np.testing.assert_allclose(smooth(KERNEL, width), want, rtol=1e-5, atol=1e-6)


def test_the_edges_of_smooth_are_divided_by_the_width():
    np.testing.assert_allclose(smooth(jnp.ones(5), 5), [3 / 5, 4 / 5, 1, 4 / 5, 3 / 5], rtol=1e-6)


@pytest.mark.parametrize("taps", [1, 2, 16, 17])
@pytest.mark.parametrize("width", [1, 3, 7, 21])
def test_smooth_frequency_is_a_correlation_of_the_half_spectrum(taps, width):
    kernel = KERNEL[..., :taps].astype(np.float64)
    half = width // 2
    spectrum = np.fft.rfft(kernel)
    padded = np.pad(spectrum, ((0, 0), (0, 0), (half, half)))
    smoothed = sum(np.exp(-((i - half) ** 2) / 2) * padded[..., i : i + spectrum.shape[-1]] for i in range(width))
    want = np.fft.irfft(smoothed, taps)
    np.testing.assert_allclose(smooth_frequency(KERNEL[..., :taps], width), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("function", [smooth, smooth_frequency])
def test_a_width_of_one_is_the_identity(function):
    np.testing.assert_allclose(function(KERNEL, 1), KERNEL, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [smooth, smooth_frequency])
@pytest.mark.parametrize("width", [0, 2, -3, 3.0, "3"])
def test_a_width_without_a_middle_is_refused(function, width):
    with pytest.raises(ValueError, match=f"width must be an odd integer >= 1; got {width!r}"):
        function(KERNEL, width)


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), np.float32(-1)])
def test_a_negative_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be >= 0; got"):
        squash(KERNEL, threshold)


def test_dropout_zeroes_at_the_rate_and_keeps_the_mean():
    kernel = jnp.ones((4, 100, 100))
    dropped = kernel_dropout(kernel, 0.2, jax.random.key(0))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1.25)}
    assert abs(float(jnp.mean(dropped == 0)) - 0.2) < 5 * (0.2 * 0.8 / kernel.size) ** 0.5  # five standard deviations
    np.testing.assert_array_equal(jax.grad(lambda k: kernel_dropout(k, 0.2, jax.random.key(0)).sum())(kernel), dropped)
    assert (kernel_dropout(kernel, 0.2, jax.random.key(1)) != dropped).any()


def test_dropout_does_nothing_when_deterministic_or_of_rate_zero():
    np.testing.assert_array_equal(kernel_dropout(KERNEL, 0.5, deterministic=True), KERNEL)
    np.testing.assert_array_equal(kernel_dropout(KERNEL, 0.0), KERNEL)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_refuses_a_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\); got"):
        kernel_dropout(KERNEL, rate, jax.random.key(0))


def test_dropout_asks_for_a_key():
    with pytest.raises(ValueError, match=r"key must be a random key where rate = 0.5 .* got None"):
        kernel_dropout(KERNEL, 0.5)


FUNCTIONS = {
    "squash": lambda k: squash(k, 0.5),
    "smooth": lambda k: smooth(k, 3),
    "smooth_frequency": lambda k: smooth_frequency(k, 3),
    "dropout": lambda k: kernel_dropout(k, 0.5, jax.random.key(0, impl="rbg")),  # threefry takes 4 s to compile
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_dtype_is_kept(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        assert FUNCTIONS[name](jnp.asarray(KERNEL, dtype)).dtype == dtype


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kernel", [KERNEL.astype(int), KERNEL * 1j, None])
def test_what_is_not_of_real_floats_is_refused(name, kernel):
    with pytest.raises(ValueError, match="kernel must"):
        FUNCTIONS[name](kernel)


@pytest.mark.parametrize("order", [tuple(FUNCTIONS), tuple(FUNCTIONS)[::-1], ("smooth", "squash", "dropout")], ids=str)
def test_all_compose_in_any_order_under_a_convolution(order):
    @jax.jit
    def f(kernel):
        for name in order:
            kernel = FUNCTIONS[name](kernel)
        return jnp.sum(jnp.tanh(long_conv(jnp.ones((3, 5)), kernel)))

    with jax.enable_x64(True):
        kernel = jnp.asarray(KERNEL[..., :7], jnp.float64)
        direction = jnp.cos(kernel)
        value, forward = jax.jit(lambda k, d: jax.jvp(f, (k,), (d,)))(kernel, direction)
        reverse = jnp.vdot(jax.jit(jax.grad(f))(kernel), direction)
        nearby = jax.jit(jax.vmap(f))(jnp.stack([kernel - 1e-6 * direction, kernel, kernel + 1e-6 * direction]))
        np.testing.assert_allclose(nearby[1], value, rtol=1e-12)
        np.testing.assert_allclose(forward, reverse, rtol=1e-12)
        np.testing.assert_allclose(forward, (nearby[2] - nearby[0]) / 2e-6, rtol=1e-7)  # off by 1e-9 of their own
