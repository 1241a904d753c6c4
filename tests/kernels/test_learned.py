"""Kernels with learned blocks: their values in the interpreter, and what is lowered to them for a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashbutterfly_jax as fb
from flashbutterfly_jax import LearnedButterfly, learned_long_conv
from flashbutterfly_jax.functional.butterfly import (
    Chain,
    learned_reference_forward,
    learned_reference_spectrum,
    learned_reference_spectrum_backward,
    mosaic_gpu,
)
from flashbutterfly_jax.functional.butterfly import twiddle as dft_twiddle
from flashbutterfly_jax.functional.butterfly.mosaic_gpu import learned_long_conv_mosaic_gpu
from pallas_kernels.fft_conv import learned_api, learned_backward_sm90, learned_paired_sm90, learned_sm90
from pallas_kernels.fft_conv.config import N1, SHARED_MEMORY_BYTES, TILE, Config
from pallas_kernels.fft_conv.tables import block_scale
from tests.kernels import resources
from tests.kernels.interpreter import interpreted
from tests.kernels.programs import LEARNED
from tests.kernels.test_lowering import kernels, lowered
from tests.tolerances import FUSED


def problem(n2, length, batch, features, dtype):
    """Inputs, with blocks as far from the DFT as their entries are large, and in float64 the result and cotangents."""
    random = np.random.default_rng(0)
    points = N1 * n2
    butterfly = LearnedButterfly("right_angle", (N1, n2), per_stage=True, learn_inverse=True)
    with jax.enable_x64(True):
        blocks = butterfly.init(jax.random.key(0), features, points, "float64")
        blocks = jax.tree.map(lambda block: block + 0.5 * random.standard_normal(block.shape), blocks)
        u, g = (jnp.asarray(random.standard_normal((batch, features, length)), dtype) for _ in range(2))
        taps = random.standard_normal((features, points)).astype(np.float32)

        def convolve(u, taps, blocks):
            return learned_long_conv(u, taps, blocks=blocks, butterfly=butterfly)

        want, vjp = jax.vjp(convolve, u.astype("float64"), taps.astype("float64"), blocks)
        want = jax.tree.map(np.asarray, (want, vjp(g.astype("float64"))))
        arguments = u, jnp.asarray(taps), jax.tree.map(lambda block: block.astype("float32"), blocks)
    return arguments, g, butterfly, want


def run(arguments, g, butterfly, config):
    """The result and the cotangents of the arguments, by the kernels in the interpreter."""

    @jax.jit
    def both(g, *arguments):
        y, vjp = jax.vjp(functools.partial(_convolve, butterfly=butterfly, config=config), *arguments)
        return y, vjp(g)

    with interpreted():
        return both(g, *arguments)


def _convolve(u, taps, blocks, *, butterfly, config):
    return learned_long_conv_mosaic_gpu(u, taps, blocks=blocks, butterfly=butterfly, config=config)


def relative_error(got, want):
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


CASES = {
    # a tile of four rows and one of one; rows that end early
    "1024": (Config(16, 1, 1, blocks=1), (16, 900, 5, 1, "bfloat16")),
    "1024-features": (Config(16, 1, 1, blocks=1), (16, 900, 5, 2, "bfloat16")),
    # two blocks for three features; two warpgroups take turns
    "1024-blocks": (Config(16, 2, 2, blocks=2), (16, 1024, 9, 3, "float16")),
    "2048": (Config(32, 2, 2, blocks=1), (32, 1100, 3, 2, "bfloat16")),
    # a pair of warpgroups; rows that end early, three features for two blocks
    "4096": (Config(64, 1, 1, blocks=1), (64, 4096, 2, 1, "bfloat16")),
    "4096-blocks": (Config(64, 2, 1, blocks=2), (64, 4000, 5, 3, "float16")),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if name == "1024" else pytest.mark.slow, id=name) for name, case in CASES.items()],
)
def test_values_and_every_cotangent_with_any_blocks(case):
    """The measured errors are at most 5.4e-3 for bfloat16 and 6.8e-4 for float16."""
    config, (n2, length, batch, features, dtype) = case
    arguments, g, butterfly, want = problem(n2, length, batch, features, dtype)
    got = run(arguments, g, butterfly, config)
    assert got[0].dtype == got[1][0].dtype == dtype
    assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, want)
    errors = jax.tree.map(relative_error, got, want)
    print(errors)
    assert max(jax.tree.leaves(errors)) < FUSED[dtype], errors


@pytest.mark.slow
def test_the_cotangents_of_the_taps_and_their_blocks_are_those_of_the_chain():
    config, random = Config(32), np.random.default_rng(0)
    m, n, spectra = (
        random.standard_normal((*shape, 2)).astype("float32").view("complex64")[..., 0]
        for shape in ((N1, N1), (32, 32), (3, N1, 32))
    )
    taps, scale = random.standard_normal((3, 2000)).astype("float32"), 1 / (2048 * block_scale(config) ** 3)
    planes = (np.stack([z.real, z.imag]) for z in (m, n, dft_twiddle(N1, 32, 0.25)))
    got = learned_api.cotangents_of_taps(taps, *planes, np.stack([spectra.real, spectra.imag], 1), config)
    rows = scale * np.pad(taps, ((0, 0), (0, 48))).reshape(3, N1, 32)
    d_rows, *want = learned_reference_spectrum_backward(*map(jnp.asarray, (rows, m, n, spectra)))
    want = [scale * d_rows.reshape(3, -1)[:, :2000], *(np.stack([z.real, z.imag]) for z in want)]
    errors = [relative_error(*pair) for pair in zip(got, want, strict=True)]
    assert max(errors) < 2e-6, errors  # 3e-7


@pytest.mark.parametrize("program", LEARNED, ids=str)
def test_shared_memory_is_what_the_compiler_found(program):
    n2 = program.config.n2
    if program.name == "learned forward":
        expected = learned_sm90.shared_memory(learned_sm90.default_config(n2))
    elif n2 == TILE:
        expected = learned_paired_sm90.SHARED_MEMORY
    else:
        default = learned_backward_sm90.default_config(n2)
        expected = learned_backward_sm90.shared_memory(default, program.config.derives_u)
    assert resources.table()[str(program)]["shared"] == expected
    assert expected + 1024 <= SHARED_MEMORY_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("learn_inverse", [False, True])
def test_the_kernel_gets_the_blocks_of_the_layer(monkeypatch, learn_inverse):
    """Its algebra, written out, in its place."""

    def algebra(u, taps, blocks, config):
        *chain, f1, f2 = blocks
        rows, taps = u.astype("float32").reshape(2, 3, N1, 16), taps.reshape(1, 3, N1, 16)
        y = learned_reference_forward(rows, learned_reference_spectrum(taps, f1, f2), Chain(*chain))
        return y.reshape(u.shape)

    monkeypatch.setattr(learned_api, "learned_fft_conv", algebra)
    butterfly = LearnedButterfly("right_angle", (N1, 16), learn_inverse=learn_inverse)
    random = np.random.default_rng(0)
    blocks = butterfly.init(jax.random.key(0), 3, 1024)
    blocks = jax.tree.map(lambda block: block + 0.5 * random.standard_normal(block.shape).astype("float32"), blocks)
    u, taps = jnp.asarray(random.standard_normal((2, 3, 1024)), "bfloat16"), jnp.ones((3, 1024))
    got = learned_long_conv_mosaic_gpu(u, taps, blocks=blocks, butterfly=butterfly)
    want = learned_long_conv(u.astype("float32"), taps, blocks=blocks, butterfly=butterfly)
    assert relative_error(got, np.asarray(want, np.float64)) < 1e-5  # 4e-7


FITS = LearnedButterfly("right_angle", (64, 16))
named = functools.partial(learned_long_conv, implementation="mosaic_gpu")


def arguments_for(butterfly=FITS, taps=900, dtype="bfloat16", channels=()):
    blocks = butterfly.init(jax.random.key(0), 2, taps)
    u, kernel = jnp.ones((1, 2, 900), dtype), jnp.ones((*channels, 2, taps))
    return u, kernel, {"blocks": blocks, "butterfly": butterfly}


def test_layers_of_both_apis_lower_for_a_gpu_where_there_is_none():
    """Without a look at any device; channels and layers share what was lowered."""
    options = {"butterfly": FITS, "implementation": "mosaic_gpu", "dtype": "bfloat16"}
    x = jax.ShapeDtypeStruct((3, 900, 2), jnp.bfloat16)
    linen = fb.linen.LongConv(2, 900, **options)
    variables = jax.eval_shape(linen.init, jax.random.key(0), x)
    graph, state = nnx.split(nnx.eval_shape(lambda: fb.nnx.LongConv(2, 900, **options, rngs=nnx.Rngs(0))))

    def both(x, variables, state):
        return linen.apply(variables, x), nnx.merge(graph, state)(x)

    text = lowered(both, x, variables, state)
    assert kernels(text) == ["fft_conv_spectrum", "learned_fft_conv_forward"]
    assert len(re.findall(r"call @_one_channel\w*\(", text)) == 4


@pytest.mark.slow
def test_a_gradient_lowers_to_both_ways_and_the_batch_may_have_any_axes():
    u, kernel, options = arguments_for(channels=(2,))
    u = jnp.ones((3, 1, *u.shape[1:]), u.dtype)
    skip = jnp.ones((2, 2))

    def total(u, kernel, skip, blocks):
        y = named(u, kernel, skip, blocks=blocks, butterfly=FITS)
        assert (y.shape, y.dtype) == ((3, 1, 2, 2, 900), u.dtype)
        return y.astype(jnp.float32).sum()

    found = kernels(lowered(jax.grad(total, (0, 1, 2, 3)), u, kernel, skip, options["blocks"]))
    assert found.count("learned_fft_conv_backward") == 2  # of u, then of the spectrum


@pytest.mark.slow
def test_vmap_is_one_kernel_in_a_loop():
    u, kernel, options = arguments_for()
    mapped = jax.vmap(lambda u: named(u, kernel, **options))
    text = lowered(mapped, jnp.ones((5, *u.shape), u.dtype))
    assert kernels(text) == ["fft_conv_spectrum", "learned_fft_conv_forward"]
    assert "stablehlo.while" in text


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("batch", "feature"), axis_types=(AxisType.Auto,) * 2)


def sharded(mesh):
    _, _, options = arguments_for()
    u = jax.ShapeDtypeStruct((8, 4, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P("batch", "feature")))
    kernel = jax.ShapeDtypeStruct((4, 1024), jnp.float32, sharding=NamedSharding(mesh, P("feature")))
    return u, kernel, options


def test_under_a_sharded_jit_the_partitioner_asks_the_kernel(mesh):
    u, kernel, options = sharded(mesh)
    text = lowered(functools.partial(named, **options), u, kernel)
    assert "CustomSPMDPartitioning" in text
    assert not kernels(text)


@pytest.mark.slow
@pytest.mark.parametrize("checked", [True, False])
def test_shard_map_runs_the_kernels_on_each_shard(mesh, checked):
    u, kernel, options = sharded(mesh)
    specs = P("batch", "feature"), P("feature")
    with jax.set_mesh(mesh):
        run = functools.partial(named, **options)
        mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=checked)
        text = lowered(mapped, u, kernel)
        gradient = jax.grad(lambda u, kernel: mapped(u, kernel).astype(jnp.float32).sum(), (0, 1))
        backward = kernels(lowered(gradient, u, kernel))
    assert kernels(text) == ["fft_conv_spectrum", "learned_fft_conv_forward"]
    assert re.search(r"@mosaic_gpu.*-> tensor<2x1x2x64x16xbf16>", text)  # of (8, 4, 1024)
    assert backward.count("learned_fft_conv_backward") == 2


def test_on_a_cpu_the_kernel_says_what_else_there_is_and_an_order_goes_on():
    u, kernel, options = arguments_for()
    with pytest.raises(NotImplementedError, match=r'for \'cpu\'. Use implementation="butterfly" or None here'):
        named(u, kernel, **options)
    got = learned_long_conv(u, kernel, **options, implementation=("mosaic_gpu", "butterfly"))
    np.testing.assert_array_equal(got, learned_long_conv(u, kernel, **options))


REFUSED = {
    "causal": (LearnedButterfly("causal", (64, 16)), "bfloat16", "takes the form 'right_angle'; got 'causal'"),
    "padded": (LearnedButterfly("padded", (64, 32)), "bfloat16", "takes the form 'right_angle'; got 'padded'"),
    "length": (LearnedButterfly("right_angle"), "bfloat16", r"got Plan\(factors=\(16, 16, 4\)\). Give Learned"),
    "factors": (LearnedButterfly("right_angle", (64, 128)), "bfloat16", r"got Plan\(factors=\(64, 128\)\)"),
    "per feature": (LearnedButterfly("right_angle", (64, 16), per_feature=True), "bfloat16", "that features share"),
    "activation": (LearnedButterfly("right_angle", (64, 16), activation=jnp.tanh), "bfloat16", "no activation"),
    "float32": (FITS, "float32", "takes bfloat16 or float16 sequences; got float32. Cast u"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_refuses_goes_elsewhere_unless_it_is_named(name):
    butterfly, dtype, message = REFUSED[name]
    u, kernel, options = arguments_for(butterfly, dtype=dtype)
    run = functools.partial(learned_long_conv, **options)
    with pytest.raises(NotImplementedError, match=message):
        run(u, kernel, implementation="mosaic_gpu")
    order = functools.partial(run, implementation=("mosaic_gpu", "butterfly"))
    assert jax.eval_shape(order, u, kernel).shape == u.shape


def test_refuses_a_reverse_kernel_and_other_implementations():
    u, kernel, options = arguments_for()
    with pytest.raises(NotImplementedError, match=r"takes no reverse_kernel; got one of shape \(2, 900\)"):
        named(u, kernel, reverse_kernel=kernel, **options)
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu': .* no reverse_kernel.* 'xla': learned blocks need"):
        learned_long_conv(u, kernel, reverse_kernel=kernel, implementation=("mosaic_gpu", "xla"), **options)
    with pytest.raises(ValueError, match="Did you mean 'mosaic_gpu'"):
        learned_long_conv(u, kernel, implementation="mosaic", **options)


def test_what_is_empty_needs_no_kernel():
    u, kernel, options = arguments_for(channels=(3,))
    y = named(u[:0], kernel, jnp.ones((3, 2)), **options)
    assert (y.shape, y.dtype) == ((0, 3, 2, 900), u.dtype)


def test_channels_and_skip_are_those_of_the_reference(monkeypatch):
    """With the reference in the kernel's place."""
    monkeypatch.setattr(mosaic_gpu, "learned_long_conv_mosaic_gpu", learned_long_conv)
    butterfly = LearnedButterfly("right_angle", (3, 2))
    random = np.random.default_rng(0)
    u, kernel, skip = (jnp.float32(random.standard_normal(shape)) for shape in ((2, 3, 2, 6), (2, 2, 6), (2, 2)))
    blocks = butterfly.init(jax.random.key(0), 2, 6)
    want = learned_long_conv(u, kernel, skip, blocks=blocks, butterfly=butterfly)
    got = mosaic_gpu.with_channels_and_skip(u, kernel, skip, blocks, butterfly)
    np.testing.assert_allclose(got, want, atol=1e-5)
    one = mosaic_gpu.with_channels_and_skip(u, kernel[0], skip[0], blocks, butterfly)
    np.testing.assert_allclose(one, want[:, :, 0], atol=1e-5)
