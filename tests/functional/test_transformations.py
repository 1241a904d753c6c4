"""The long convolution on `"xla"` under every transformation of JAX: of any order, and of one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from flashbutterfly_jax import long_conv
from tests.parity import Case, cast

LENGTH, TAPS = 6, 9
NAMES = ("u", "kernel", "skip", "reverse_kernel", "pre_gate", "post_gate")


def request(dtype="float64", batch=(2,)) -> tuple[jax.Array, ...]:
    case = Case(LENGTH, TAPS, True, channels=2, skip=True, pre_gate=True, post_gate="own", batch=batch, features=2)
    arrays = cast(case.arguments(), dtype)
    return tuple(arrays[name] for name in NAMES)


def convolve(u, kernel, skip, reverse_kernel, pre_gate, post_gate, *, circular=False):
    gates = {"pre_gate": pre_gate, "post_gate": post_gate}
    return long_conv(u, kernel, skip, reverse_kernel=reverse_kernel, circular=circular, implementation="xla", **gates)


def loss(*arrays):
    return jnp.sum(jnp.tanh(convolve(*arrays)))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("x64")
def test_derivatives_of_both_modes_and_two_orders_against_finite_differences():
    *arrays, pre_gate, post_gate = request()

    def f(*arrays):
        return jnp.tanh(convolve(*arrays, pre_gate, post_gate))

    # Differences of second derivatives are off by up to 4.4e-6 here, of their own.
    check_grads(jax.jit(f), arrays, order=2, modes=["fwd", "rev"], rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("x64")
def test_reverse_over_reverse_is_forward_over_reverse():
    arrays = request()
    directions = tuple(jnp.cos(1 + i * x) for i, x in enumerate(arrays))
    every = tuple(range(len(arrays)))
    gradient = jax.grad(loss, argnums=every)

    def slope(*arrays):
        return sum(jnp.vdot(g, d) for g, d in zip(gradient(*arrays), directions, strict=True))

    _, forward = jax.jit(lambda: jax.jvp(gradient, arrays, directions))()
    for a, b in zip(jax.jit(jax.grad(slope, argnums=every))(*arrays), forward, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_hessian_is_symmetric_and_that_of_a_square():
    """Of half the squared norm of a linear map, the Hessian is the Gram matrix of its Jacobian."""
    u, kernel, *_ = request(batch=())

    def half_square(kernel):
        return 0.5 * jnp.sum(long_conv(u, kernel) ** 2)

    hessian = jax.jit(jax.hessian(half_square))(kernel).reshape(kernel.size, kernel.size)
    jacobian = jax.jit(jax.jacfwd(lambda kernel: long_conv(u, kernel)))(kernel).reshape(-1, kernel.size)
    np.testing.assert_allclose(hessian, jacobian.T @ jacobian, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("which", range(len(NAMES)), ids=NAMES)
def test_vmap_over_one_argument(which, axis):
    arrays = request()
    mapped = jnp.stack([arrays[which], jnp.sin(arrays[which]), -arrays[which]], axis)
    in_axes = [axis if i == which else None for i in range(len(arrays))]
    every = tuple(range(len(arrays)))
    function = jax.value_and_grad(loss, argnums=every)
    got = jax.jit(jax.vmap(function, in_axes))(*arrays[:which], mapped, *arrays[which + 1 :])
    function = jax.jit(function)
    for i in range(3):
        one = function(*arrays[:which], jnp.take(mapped, i, axis), *arrays[which + 1 :])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_vmap_over_everything_twice_is_two_batch_axes():
    arrays = [jnp.stack([jnp.stack([x, -x]), jnp.stack([jnp.sin(x), x])]) for x in request()]
    got = jax.jit(jax.vmap(jax.vmap(convolve)))(*arrays)
    for i, j in np.ndindex(2, 2):
        np.testing.assert_allclose(got[i, j], convolve(*(x[i, j] for x in arrays)), rtol=1e-12, atol=1e-12)


def assert_same_gradient(transformed, arrays):
    every = tuple(range(len(arrays)))
    want = jax.jit(jax.grad(loss, argnums=every))(*arrays)
    got = jax.jit(jax.grad(transformed, argnums=every))(*arrays)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_remat():
    assert_same_gradient(jax.checkpoint(loss), request())


@pytest.mark.usefixtures("x64")
def test_remat_of_what_is_saved_by_name_only():
    policy = jax.checkpoint_policies.dots_saveable
    assert_same_gradient(jax.checkpoint(loss, policy=policy), request())


@pytest.mark.usefixtures("x64")
def test_scan():
    u, kernel, *_ = request(batch=())

    def two_layers(u, kernel):
        return jnp.sum(jax.lax.scan(lambda u, k: (jnp.tanh(long_conv(u, k)), None), u, kernel)[0])

    def unrolled(u, kernel):
        return jnp.sum(jnp.tanh(long_conv(jnp.tanh(long_conv(u, kernel[0])), kernel[1])))

    for a, b in zip(*(jax.jit(jax.grad(f, argnums=(0, 1)))(u, kernel) for f in (two_layers, unrolled)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_without_jit():
    arrays = request("float32")
    with jax.disable_jit():
        got = jax.value_and_grad(loss)(*arrays)
    np.testing.assert_allclose(got[1], jax.grad(loss)(*arrays), rtol=1e-5, atol=1e-5)


def test_the_transpose_of_a_causal_convolution_is_an_anticausal_one():
    u, kernel, *_ = request("float32")
    kernel = kernel[0]
    y, pull_back = jax.vjp(lambda u: long_conv(u, kernel), u)
    want = jnp.flip(long_conv(jnp.flip(y, -1), kernel), -1)
    np.testing.assert_allclose(pull_back(y)[0], want, rtol=0, atol=1e-6 * jnp.abs(want).max())


def test_symbolic_batch_size_in_export():
    u, kernel, *_ = request("float32")
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(long_conv))(jax.ShapeDtypeStruct((batch, *u.shape[1:]), u.dtype), kernel)
    np.testing.assert_allclose(exported.call(u, kernel), long_conv(u, kernel), rtol=1e-6, atol=1e-6)
