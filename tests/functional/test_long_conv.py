"""What the long convolution accepts, refuses and promises, whatever runs it."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import long_conv
from tests.parity import MODES, relative_error

U = np.linspace(-1, 2, 2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)
KERNEL = np.linspace(1, -1, 3 * 5, dtype=np.float32).reshape(3, 5)
KERNELS = np.stack([KERNEL, KERNEL[::-1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": U[0, 0]}, r"u must have shape \(\*B, D, L\), at least two axes; got shape \(8,\)"),
        ({"u": U.astype(np.complex64)}, "u must have a real floating-point dtype; got complex64"),
        ({"u": U.astype(np.int32)}, "u must have a real floating-point dtype; got int32"),
        ({"u": None}, "u must be an array; got None"),
        ({"u": "sequence"}, "u must be an array; got 'sequence'"),
        ({"kernel": KERNEL[0]}, r"kernel must have shape \(D, K\) or \(C, D, K\) .* got shape \(5,\)"),
        ({"kernel": KERNELS[None]}, r"kernel must have shape .* got shape \(1, 2, 3, 5\)"),
        ({"kernel": KERNEL[:2]}, r"kernel must have .* D = 3 as in u of shape \(2, 3, 8\); got shape \(2, 5\)"),
        ({"kernel": KERNEL[:, :0]}, r"kernel must have .* K >= 1 .* got shape \(3, 0\)"),
        ({"kernel": KERNEL.astype(int)}, "kernel must have a real floating-point dtype; got int"),
        ({"skip": KERNEL}, r"skip must have shape \(3,\), .* got shape \(3, 5\)"),
        ({"kernel": KERNELS, "skip": KERNEL[:, 0]}, r"skip must have shape \(2, 3\), .* got shape \(3,\)"),
        ({"skip": KERNEL[:, 0] * 1j}, "skip must have a real floating-point dtype; got complex64"),
        ({"reverse_kernel": KERNEL[:, :4]}, r"reverse_kernel must have shape \(3, 5\), .* got shape \(3, 4\)"),
        ({"pre_gate": U[0]}, r"pre_gate must have shape \(2, 3, 8\), .* got shape \(3, 8\)"),
        ({"post_gate": U[..., :1]}, r"post_gate must have shape \(2, 3, 8\), .* got shape \(2, 3, 1\)"),
        (
            {"kernel": KERNELS, "post_gate": U[:, None]},
            r"post_gate must have shape \(2, 3, 8\) or \(2, 2, 3, 8\), .* got shape \(2, 1, 3, 8\)",
        ),
        ({"circular": 1}, "circular must be True or False; got 1"),
        ({"precision": "exact"}, "precision must be None, .*'highest'.*; got 'exact'"),
        ({"implementation": "xls"}, "implementation must be None or of .*; got 'xls'. Did you mean 'xla'"),
        ({"implementation": "mosaic"}, "Did you mean 'mosaic_gpu'"),
        ({"implementation": ("xla", "cuda")}, "got 'cuda'"),
        ({"implementation": 3}, "implementation must be None or of .*; got 3"),
        ({"implementation": ()}, r"implementation must name at least one of .*; got \(\)"),
    ],
)
def test_a_wrong_request_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        long_conv(**{"u": U, "kernel": KERNEL} | changes)


def test_a_named_implementation_runs_or_raises():
    with pytest.raises(NotImplementedError, match=r'[Uu]se implementation="xla"'):
        long_conv(U, KERNEL, implementation="triton")


def test_a_sequence_of_implementations_falls_back_from_what_is_not_supported_only():
    np.testing.assert_array_equal(
        long_conv(U, KERNEL, implementation=("triton", "xla")), long_conv(U, KERNEL, implementation="xla")
    )
    with pytest.raises(NotImplementedError, match=r"No implementation named supports this request. ('triton': .*){2}"):
        long_conv(U, KERNEL, implementation=("triton", "triton"))
    with pytest.raises(ValueError, match="kernel must have"):
        long_conv(U, KERNEL[:1], implementation=("triton", "xla"))


def test_the_error_of_an_implementation_is_not_hidden_by_the_next(monkeypatch):
    def breaks(*args, **kwargs):
        raise ArithmeticError("out of registers")  # NotImplementedError is a RuntimeError

    module = importlib.import_module("flashbutterfly_jax.functional.long_conv")
    monkeypatch.setattr(module, "_load", lambda name: breaks)
    with pytest.raises(ArithmeticError, match="out of registers"):
        long_conv(U, KERNEL, implementation=("triton", "xla"))


def test_none_runs_every_mode():
    for mode in MODES.values():
        reverse_kernel = KERNEL if mode["bidirectional"] else None
        y = long_conv(U, KERNEL, reverse_kernel=reverse_kernel, circular=mode["circular"])
        want = long_conv(U, KERNEL, reverse_kernel=reverse_kernel, circular=mode["circular"], implementation="xla")
        np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("precision", [None, "highest", "float32", jax.lax.Precision.DEFAULT])
def test_precision_takes_what_jax_takes(precision):
    np.testing.assert_array_equal(long_conv(U, KERNEL, precision=precision), long_conv(U, KERNEL))


def test_array_likes_are_accepted():
    y = long_conv(U.tolist(), KERNEL.tolist(), KERNEL[:, 0].tolist(), pre_gate=U.tolist(), post_gate=U.tolist())
    want = long_conv(*map(jnp.asarray, (U, KERNEL, KERNEL[:, 0])), pre_gate=jnp.asarray(U), post_gate=jnp.asarray(U))
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 3, 8), (2, 3, 0), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("channels", [(), (2,)])
def test_an_empty_sequence_gives_an_empty_result_and_zero_gradients(shape, circular, channels):
    u, kernel = jnp.ones(shape, jnp.bfloat16), jnp.ones((*channels, shape[-2], 5))
    skip, gate = kernel[..., 0], jnp.ones(shape)

    def total(u, kernel, skip, gate):
        y = long_conv(u, kernel, skip, reverse_kernel=kernel, circular=circular, pre_gate=gate, post_gate=gate)
        assert y.shape == (*shape[:-2], *channels, *shape[-2:])
        assert y.dtype == u.dtype
        return y.sum(dtype=jnp.float32)

    for argument, gradient in zip(
        (u, kernel, skip, gate), jax.grad(total, argnums=(0, 1, 2, 3))(u, kernel, skip, gate), strict=True
    ):
        assert (gradient.shape, gradient.dtype) == (argument.shape, argument.dtype)
        assert not gradient.any()


def test_no_channels_give_no_result():
    assert long_conv(U, KERNELS[:0]).shape == (2, 0, 3, 8)


def test_no_batch_axes_are_needed():
    np.testing.assert_allclose(long_conv(U[0], KERNEL), long_conv(U, KERNEL)[0], rtol=1e-6)


@pytest.mark.parametrize("taps", [1, 5, 8, 9, 16, 40])
def test_causal_by_gradient(taps):
    """With K > L too: there the authors' code lets taps L … 2L - 1 wrap around and leak the future into the past."""
    u, kernel = jax.random.normal(jax.random.key(0), (3, 8)), jax.random.normal(jax.random.key(1), (3, taps))
    jacobian = jax.jacobian(long_conv)(u, kernel)  # (D, L, D, L)
    for feature in range(3):
        dy_du = jacobian[feature, :, feature, :]
        assert jnp.abs(jnp.triu(dy_du, 1)).max() < 1e-6
        np.testing.assert_allclose(dy_du[:, 0], jnp.pad(kernel[feature], (0, 8))[:8], atol=1e-6)
        assert not jacobian[feature, :, jnp.arange(3) != feature, :].any()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_taps_past_the_length_reach_nothing(bidirectional):
    """Not even by a NaN; the reverse kernel reaches L - 1 steps ahead, so its tap L - 1 is already past."""
    kernel = jax.random.normal(jax.random.key(0), (3, 20))
    reverse_kernel = kernel[:, ::-1] if bidirectional else None
    tainted = kernel.at[:, 8:].set(jnp.nan)
    reverse_tainted = reverse_kernel.at[:, 7:].set(jnp.nan) if bidirectional else None
    got = long_conv(U, tainted, reverse_kernel=reverse_tainted)
    np.testing.assert_array_equal(got, long_conv(U, kernel, reverse_kernel=reverse_kernel))
    gradient = jax.grad(lambda kernel: long_conv(U, kernel, reverse_kernel=reverse_kernel).sum())(kernel)
    assert not gradient[:, 8:].any()
    assert gradient[:, :8].all()


def test_float64_anywhere_computes_in_float64():
    with jax.enable_x64(True):
        u, kernel = jnp.asarray(U), jnp.asarray(KERNEL, jnp.float64)
        assert long_conv(u, kernel).dtype == jnp.float32
        exact = long_conv(jnp.asarray(U, jnp.float64), kernel)
        assert exact.dtype == jnp.float64
        assert relative_error(long_conv(u, kernel), np.asarray(exact)) < 2**-24  # its own rounding and no more


def test_strict_dtype_promotion_is_no_obstacle():
    with jax.numpy_dtype_promotion("strict"):
        u, gate = jnp.asarray(U, jnp.bfloat16), jnp.asarray(U, jnp.float16)
        y = long_conv(u, KERNEL, KERNEL[:, 0], reverse_kernel=KERNEL, pre_gate=gate, post_gate=gate)
    assert y.dtype == jnp.bfloat16


def test_recompiles_only_for_new_shapes():
    traces = []

    @jax.jit
    def convolve(u, kernel):
        traces.append(u.shape)
        return long_conv(u, kernel)

    for scale in (1, 2, 3):
        convolve(scale * U, KERNEL)
    assert len(traces) == 1
