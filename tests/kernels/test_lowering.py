"""Kernels that ship lower for CUDA without CUDA; and which computation is lowered to which implementation.

Mosaic takes seconds to lower a kernel, so that most of these tests have only one or two, and those of `arrays()`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashbutterfly_jax import long_conv
from tests.kernels.programs import PROGRAMS, TYPICAL

fused = functools.partial(long_conv, implementation="mosaic_gpu")
SPECTRUM, FORWARD, BACKWARD = "fft_conv_spectrum", "fft_conv_forward", "fft_conv_backward"


def lowered(function, *arguments, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def kernels(text: str) -> list[str]:
    """The fused kernels that a lowered program has, in alphabetical order: equal ones are one, however often called."""
    calls = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    return sorted(re.findall(r"((?:fft_conv|learned)_\w+)_mosaic_gpu", line)[0] for line in calls)


def arrays(length: int = 1024, dtype="bfloat16", batch=(4,), features: int = 3):
    """u and a kernel, without their numbers."""
    u = jax.ShapeDtypeStruct((*batch, features, length), dtype)
    return u, jax.ShapeDtypeStruct((features, length), jnp.float32)


def total(*arguments, **options):
    return fused(*arguments, **options).astype(jnp.float32).sum()


gradient = jax.grad(total, (0, 1))


def in_the_fast_lane() -> set[str]:
    """One program of each kernel but three: the streamed one takes half a minute, two are in the test that follows.

    `resources.json` holds that all were lowered, and compiled, as they are: `test_resources`.
    """
    names: dict[str, str] = {}
    for program in TYPICAL:
        names.setdefault(program.function, str(program))
    return set(names.values()) - {names[function] for function in ("fft_conv_streamed_forward", FORWARD, BACKWARD)}


FAST = in_the_fast_lane()


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(program, marks=[] if str(program) in FAST else pytest.mark.slow, id=str(program))
        for program in PROGRAMS
    ],
)
def test_every_program_lowers(program):
    kernel, operands = program.build()
    assert kernels(lowered(kernel, *operands)) == [program.function]


def test_a_convolution_is_one_kernel_after_that_of_the_taps_and_its_gradient_another():
    assert kernels(lowered(fused, *arrays())) == [FORWARD, SPECTRUM]
    assert kernels(lowered(gradient, *arrays())) == [BACKWARD, SPECTRUM]


def test_layers_share_the_kernels_of_one():
    def three_layers(u, kernel):
        for _ in range(3):
            u = fused(u, kernel)
        return u.astype(jnp.float32).sum()

    assert kernels(lowered(jax.grad(three_layers, (0, 1)), *arrays())) == [BACKWARD, FORWARD, SPECTRUM]


@pytest.mark.slow
def test_a_gated_gradient_is_one_kernel_too():
    u, kernel = arrays()

    def gated(u, kernel, pre_gate, post_gate):
        return total(u, kernel, pre_gate=pre_gate, post_gate=post_gate)

    assert kernels(lowered(jax.grad(gated, (0, 1, 2, 3)), u, kernel, u, u)) == [BACKWARD, SPECTRUM]


@pytest.mark.parametrize(("channels", "launches"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_two_channels_share_a_kernel(channels, launches):
    u, _ = arrays()
    names = kernels(lowered(fused, u, jax.ShapeDtypeStruct((channels, 3, 7), "float32")))
    assert names == [FORWARD] * launches + [SPECTRUM] * launches


@pytest.mark.parametrize(
    ("function", "name"), [(fused, FORWARD), pytest.param(gradient, BACKWARD, marks=pytest.mark.slow)]
)
def test_vmap(function, name):
    u, kernel = arrays(batch=(2, 2))
    assert kernels(lowered(jax.vmap(function, in_axes=(0, None)), u, kernel)) == [name, SPECTRUM]


@pytest.mark.slow
def test_checkpoint_recomputes_what_the_gradient_needs():
    def squares(u, kernel):
        return jax.checkpoint(lambda u, kernel: (fused(u, kernel).astype(jnp.float32) ** 2).sum())(u, kernel)

    assert kernels(lowered(jax.grad(squares, (0, 1)), *arrays())) == [BACKWARD, FORWARD, SPECTRUM]


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request):
    mesh = jax.make_mesh((4, 2), ("batch", "feature"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def sharded(mesh):
    u, kernel = arrays(batch=(16,), features=6)
    u_sharding, kernel_sharding = NamedSharding(mesh, P("batch", "feature")), NamedSharding(mesh, P("feature"))
    return u.update(sharding=u_sharding), kernel.update(sharding=kernel_sharding)


def _gated_gradient(u, kernel):
    return jax.grad(lambda u, kernel: total(u, kernel, pre_gate=u, post_gate=u), (0, 1))(u, kernel)


@pytest.mark.parametrize("function", [fused, gradient, _gated_gradient], ids=["forward", "gradient", "gated-gradient"])
def test_under_a_sharded_jit_the_partitioner_asks_the_kernel(mesh, function):
    text = lowered(function, *sharded(mesh))
    assert "CustomSPMDPartitioning" in text
    assert not kernels(text)  # a bare one would be replicated


@pytest.mark.parametrize("checked", [True, False])
def test_shard_map_runs_the_kernel_on_each_shard(checked):
    mesh = jax.make_mesh((4, 2), ("batch", "feature"), axis_types=(AxisType.Auto,) * 2)
    specs = P("batch", "feature"), P("feature")
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(fused, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=checked)
        text = lowered(mapped, *sharded(mesh))
    assert kernels(text) == [FORWARD, SPECTRUM]
    assert re.search(r"@mosaic_gpu.*-> tensor<4x1x3x64x16xbf16>", text)  # of (16, 6, 1024)


@pytest.mark.parametrize("length", [1024, pytest.param(20000, marks=pytest.mark.slow)])
def test_the_default_in_shard_map_sums_the_gradient_of_taps_that_devices_share(length):
    """Lowered for CUDA it takes the kernels, run here it is XLA's; what varies is checked, as it is unless told."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    u, kernel = (
        jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), x.dtype) for x in arrays(length, batch=(16,))
    )

    def gradient(convolve):
        return jax.grad(lambda u, kernel: (convolve(u, kernel).astype(jnp.float32) ** 2).sum(), (0, 1))

    convolve = jax.shard_map(long_conv, mesh=mesh, in_specs=(P("batch"), P()), out_specs=P("batch"))
    assert any("backward" in name for name in kernels(lowered(gradient(convolve), u, kernel)))
    got, want = (jax.jit(gradient(each))(u, kernel) for each in (convolve, long_conv))
    np.testing.assert_array_equal(got[0], want[0])
    error = jnp.linalg.norm(got[1] - want[1]) / jnp.linalg.norm(want[1])
    assert error < 2e-6  # 1.0e-7


@pytest.mark.parametrize(
    ("function", "name"), [(fused, FORWARD), pytest.param(gradient, BACKWARD, marks=pytest.mark.slow)]
)
def test_export(function, name):
    exported = jax.export.export(jax.jit(function), platforms=("cuda",))(*arrays())
    assert kernels(exported.mlir_module()) == [name, SPECTRUM]


@pytest.mark.parametrize(
    ("length", "dtype", "takes"),
    [
        (255, "bfloat16", False),
        (256, "bfloat16", True),
        (4096, "float16", True),
        (65536, "bfloat16", True),
        (2**22 + 1, "bfloat16", False),
        (1024, "float32", False),
    ],
)
def test_the_default_takes_the_kernel_where_it_is_faster_at_the_error_of_the_dtype(length, dtype, takes):
    """Traced alone: that CUDA gets it, and a CPU does not, is in the tests before and after."""
    assert ("fft_conv_kernel" in str(jax.jit(long_conv).trace(*arrays(length, dtype)).jaxpr)) == takes


def test_the_default_on_a_cpu_is_xla():
    text = lowered(long_conv, *arrays(), platform="cpu")
    assert not kernels(text)
    assert "stablehlo.fft" in text


@pytest.mark.parametrize("call", [lambda f: f, jax.jit, lambda f: jax.jit(jax.grad(lambda u, k: f(u, k).sum()))])
def test_on_a_cpu_the_kernel_says_what_else_there_is(call):
    u, kernel = (jnp.ones(x.shape, x.dtype) for x in arrays())
    with pytest.raises(NotImplementedError, match=r'for \'cpu\'. Use implementation="xla" or None here'):
        call(fused)(u, kernel)


REFUSED = {
    "float64": (arrays(dtype="float64"), {}, "takes bfloat16, float16 and float32; got float64"),
    "length": (arrays(2**22 + 1), {}, "at most 4194304 steps; got 4194305"),
    "precision": (arrays(dtype="float32"), {"precision": "highest"}, "got precision HIGHEST for a float32 u"),
    "size": (arrays(2048, batch=(2**17,), features=8), {}, r"fewer than 2\*\*31 numbers"),
    "size of what three passes keep": (arrays(65536, batch=(2**11,), features=8), {}, r"fewer than 2\*\*30 numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_refuses_goes_elsewhere_unless_it_is_named(name):
    (u, kernel), options, reason = REFUSED[name]
    with jax.enable_x64(name == "float64"):
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(functools.partial(fused, **options), u, kernel)
        for implementation in (None, ("mosaic_gpu", "xla")):
            text = lowered(functools.partial(long_conv, **options, implementation=implementation), u, kernel)
            assert not kernels(text)
            assert "stablehlo.fft" in text


def test_one_number_less_than_too_many_is_taken():
    u, kernel = arrays(2048, batch=(2**17 - 1,), features=8)
    assert jax.eval_shape(fused, u, kernel).shape == u.shape


@pytest.mark.parametrize("shape", [(0, 3, 1024), (4, 0, 1024), (4, 3, 0)])
def test_what_is_empty_needs_no_kernel(shape):
    y = fused(jnp.ones(shape, "bfloat16"), jnp.ones((shape[1], 5)))
    assert (y.shape, y.dtype) == (shape, "bfloat16")
