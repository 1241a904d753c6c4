"""That equal kernels are lowered once: in a program, in a process, and as they would be on their own."""

import functools
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flashbutterfly_jax as fb
from pallas_kernels.fft_conv import lowering
from pallas_kernels.fft_conv.lowering import lowered_once
from tests.kernels.interpreter import interpreted
from tests.kernels.test_lowering import kernels, lowered

X = jax.ShapeDtypeStruct((64, 128), jnp.float32)


def scaled(factor: float, rows: int = 64):
    """A kernel that lowers in a moment."""

    def fft_conv_scaled(x, y):
        y[...] = factor * x[...].astype(jnp.float32)

    return plgpu.kernel(fft_conv_scaled, out_type=jax.ShapeDtypeStruct((rows, 128), jnp.float32))


def thrice(x):
    for _ in range(3):
        x = lowered_once(scaled, 2.0)(x)
    return x


@pytest.fixture
def lowerings():
    """The calls of what lowers a kernel where none is known yet."""
    lowering._kept.cache_clear()
    jax.clear_caches()
    with mock.patch.object(lowering.mlir, "lower_fun", wraps=lowering.mlir.lower_fun) as lower:
        yield lower


def test_a_program_has_a_kernel_once_and_a_process_lowers_it_once(lowerings):
    first = lowered(thrice, X)
    assert kernels(first) == ["fft_conv_scaled"]
    assert first.count(" call @") == 3
    assert lowerings.call_count == 1
    jax.clear_caches()
    assert lowered(thrice, X) == first
    assert lowerings.call_count == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda x: lowered_once(scaled, 3.0)(x),
        lambda x: lowered_once(functools.partial(scaled, 2.0))(x),
        lambda x: lowered_once(scaled, 2.0)(x.astype(jnp.bfloat16)),
    ],
    ids=["arguments", "maker", "types"],
)
def test_another_kernel_is_lowered_too(lowerings, other):
    assert len(kernels(lowered(lambda x: thrice(x) + other(x), X))) == 2
    assert lowerings.call_count == 2


def test_export_has_one_of_its_own(lowerings):
    """Its code is of a version that later runtimes read."""
    lowered(thrice, X)
    exported = jax.export.export(jax.jit(thrice), platforms=("cuda",))(X)
    assert kernels(exported.mlir_module()) == ["fft_conv_scaled"]
    assert lowerings.call_count == 2


def test_shards_share_it(lowerings):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(thrice, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))
    text = lowered(mapped, jax.ShapeDtypeStruct((128, 128), jnp.float32))
    assert set(kernels(text)) == {"fft_conv_scaled"}
    assert kernels(lowered(thrice, X)) == ["fft_conv_scaled"]
    assert lowerings.call_count == 1


def test_it_is_interpreted_where_kernels_are_and_refused_elsewhere():
    x = np.random.default_rng(0).standard_normal(X.shape, np.float32)
    for _ in range(2):
        with interpreted():
            np.testing.assert_array_equal(jax.jit(thrice)(x), 8 * x)
        with pytest.raises(NotImplementedError, match="fft_conv_kernel"):
            jax.jit(thrice)(x)


@pytest.mark.parametrize(
    "more",
    [lambda y: y + 1.0, lambda y: y.reshape(128, 64), lambda y: (y, y)],
    ids=["another operation", "another shape", "a result twice"],
)
def test_what_is_more_than_a_launch_is_refused(more):
    """Only the call is kept: what comes after it would be left out from the second time on."""
    with pytest.raises(ValueError, match="must give one launch of its operands"):
        lowered(lambda x: lowered_once(lambda: lambda x: more(scaled(2.0)(x)))(x), X)


@pytest.mark.parametrize("reverse", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("length", [1024, 4096, 8192, 16_384, 32_768, 65_536])
def test_all_that_a_gradient_launches_is(length, reverse):
    """It is refused as it is traced, so nothing need be lowered to see it."""

    def loss(u, taps):
        y = fb.long_conv(u, taps, reverse_kernel=taps if reverse else None, implementation="mosaic_gpu")
        return y.astype(jnp.float32).sum()

    u, taps = jax.ShapeDtypeStruct((2, 8, length), jnp.bfloat16), jax.ShapeDtypeStruct((8, length), jnp.float32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(u, taps)
    assert "fft_conv_kernel" in str(traced.jaxpr)
