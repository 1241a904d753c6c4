"""The kernel with learned blocks: its values in the interpreter, its program for a GPU, and what compiling it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import LearnedButterfly, learned_long_conv
from flashbutterfly_jax.functional.butterfly import (
    Chain,
    Plan,
    learned_reference_forward,
    learned_reference_spectrum,
    stage_blocks,
)
from flashbutterfly_jax.functional.butterfly.mosaic_gpu import learned_long_conv_mosaic_gpu
from pallas_kernels.fft_conv import learned_sm90
from pallas_kernels.fft_conv.config import N1, SHARED_MEMORY_BYTES, Config
from pallas_kernels.fft_conv.kernel_sm90 import Shapes
from tests.kernels import ahead_of_time
from tests.kernels.interpreter import interpreted
from tests.kernels.programs import DTYPES, FEATURES, Program
from tests.tolerances import FUSED


def problem(n2, length, batch, features, dtype):
    """Inputs of the kernel, with blocks as far from the DFT as their entries are large, and the result in float64."""
    random = np.random.default_rng(0)
    points = N1 * n2
    config = LearnedButterfly("right_angle", (N1, n2), per_stage=True, learn_inverse=True)
    with jax.enable_x64(True):
        blocks = config.init(jax.random.key(0), features, points, "float64")
        blocks = jax.tree.map(lambda block: block + 0.5 * random.standard_normal(block.shape), blocks)
        u = jnp.asarray(random.standard_normal((batch, features, length)), dtype)
        taps = random.standard_normal((features, points)).astype(np.float32)
        want = learned_long_conv(u.astype("float64"), taps, blocks=blocks, butterfly=config)
        stages = {
            name: stage_blocks(tree, Plan((N1, n2)), 0.25, inverse=name == "output") for name, tree in blocks.items()
        }
        there, of_taps, back = (
            [jnp.asarray(block, "complex64") for block in stages[name]] for name in ("input", "kernel", "output")
        )
    # A left product takes [k, n]; the right one of the second factor its transpose.
    chain = learned_sm90.Blocks(there[0], there[1].T, back[1].T, back[0])
    return (u, jnp.asarray(taps), chain, of_taps[0], of_taps[1].T), np.asarray(want)


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def run(arguments, config):
    with interpreted():
        return jax.jit(functools.partial(learned_sm90.learned_fft_conv, config=config))(*arguments)


CASES = {
    # a tile of four rows and one of one, over two features; rows that end early
    "1024": (Config(16, 1, 1, blocks=1), (16, 900, 5, 2, "bfloat16")),
    # two blocks for three features; two warpgroups take turns
    "1024-blocks": (Config(16, 2, 2, blocks=2), (16, 1024, 9, 3, "float16")),
    "2048": (Config(32, 2, 2, blocks=1), (32, 1100, 3, 2, "bfloat16")),
    "4096": (Config(64, 1, 1, blocks=1), (64, 4096, 2, 1, "bfloat16")),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if name == "1024" else pytest.mark.slow, id=name) for name, case in CASES.items()],
)
def test_values_with_any_blocks(case):
    """The measured errors are 5.3e-3 for bfloat16 and 6.5e-4 for float16."""
    config, (n2, length, batch, features, dtype) = case
    arguments, want = problem(n2, length, batch, features, dtype)
    got = run(arguments, config)
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert relative_error(got, want) < FUSED[dtype]


@pytest.mark.slow
def test_every_block_matters():
    """An error planted in any of them, and in the transform of the taps, shows."""
    (u, taps, chain, *of_taps), want = problem(16, 300, 1, 1, "bfloat16")
    config = Config(16, 1, 1, blocks=1)

    @jax.jit
    def convolve(chain, f1, f2):
        return learned_sm90.learned_fft_conv(u, taps, chain, f1, f2, config)

    with interpreted():
        assert relative_error(convolve(chain, *of_taps), want) < FUSED["bfloat16"]
        for name in chain._fields:
            wrong = chain._replace(**{name: getattr(chain, name).conj()})
            assert relative_error(convolve(wrong, *of_taps), want) > 0.1, name
        assert relative_error(convolve(chain, of_taps[0].conj(), of_taps[1]), want) > 0.1
        assert relative_error(convolve(chain, of_taps[0], of_taps[1].conj()), want) > 0.1


def _build(program):
    config, options, dtype = program.config, program.options, jnp.dtype(program.dtype)
    shapes = Shapes(64 - options, 1, FEATURES, N1 - 8 * options, dtype)
    u = jax.ShapeDtypeStruct((shapes.batch, FEATURES, shapes.length, config.n2), dtype)
    spectrum = jax.ShapeDtypeStruct((FEATURES, 2, N1, config.n2), dtype)
    exact = learned_sm90.Blocks(*(jax.ShapeDtypeStruct((n, n), "complex64") for n in (N1, config.n2, config.n2, N1)))
    tables = jax.eval_shape(functools.partial(learned_sm90.tables, config=config), exact)
    tables = [jax.ShapeDtypeStruct(table.shape, dtype) for table in tables]
    return learned_sm90.forward(config, shapes), (u, spectrum, *tables, jax.ShapeDtypeStruct((1,), jnp.int32))


PROGRAMS = [
    Program("learned forward", _build, learned_sm90.default_config(n2), dtype, options, "learned_fft_conv_forward")
    for n2 in (16, 32, 64)
    for dtype in DTYPES
    for options in (False, True)
]


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.dtype == "bfloat16" and p.options], ids=str)
def test_lowers_for_a_gpu(program):
    kernel, operands = program.build()
    text = jax.jit(kernel).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert learned_sm90.shared_memory(program.config) + 1024 <= SHARED_MEMORY_BYTES


@pytest.mark.slow
@pytest.mark.skipif(
    ahead_of_time.versions() is None, reason=f"needs the cuda-aot extra, {', '.join(ahead_of_time.WHEELS)}"
)
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_compiles_without_spilling(program):
    verdict = ahead_of_time.verdict(program)
    assert (verdict.stack, verdict.spilled) == (0, 0)
    assert verdict.shared == learned_sm90.shared_memory(program.config)
    assert not verdict.notes


@pytest.mark.parametrize("learn_inverse", [False, True])
def test_the_kernel_gets_the_blocks_of_the_layer(monkeypatch, learn_inverse):
    """Its algebra, written out, in its place."""

    def algebra(u, taps, blocks, f1, f2, config):
        rows, taps = u.astype("float32").reshape(2, 3, N1, config.n2), taps.reshape(1, 3, N1, config.n2)
        y = learned_reference_forward(rows, learned_reference_spectrum(taps, f1, f2), Chain(*blocks))
        return y.reshape(u.shape)

    monkeypatch.setattr(learned_sm90, "learned_fft_conv", algebra)
    butterfly = LearnedButterfly("right_angle", (N1, 16), learn_inverse=learn_inverse)
    random = np.random.default_rng(0)
    blocks = butterfly.init(jax.random.key(0), 3, 1024)
    blocks = jax.tree.map(lambda block: block + 0.5 * random.standard_normal(block.shape).astype("float32"), blocks)
    u, taps = jnp.asarray(random.standard_normal((2, 3, 1024)), "bfloat16"), jnp.ones((3, 1024))
    got = learned_long_conv_mosaic_gpu(u, taps, blocks=blocks, butterfly=butterfly)
    want = learned_long_conv(u.astype("float32"), taps, blocks=blocks, butterfly=butterfly)
    assert relative_error(got, np.asarray(want, np.float64)) < 1e-5  # 4e-7


@pytest.mark.parametrize(
    ("butterfly", "dtype", "message"),
    [
        (LearnedButterfly("right_angle", (32, 32)), "bfloat16", "takes the form 'right_angle' with the factors 64"),
        (LearnedButterfly("padded", (64, 32)), "bfloat16", "takes the form 'right_angle' with the factors 64"),
        (LearnedButterfly("right_angle", (64, 16), per_feature=True), "bfloat16", "that features share"),
        (LearnedButterfly("right_angle", (64, 16)), "float32", r"takes bfloat16 or float16 sequences .* got float32"),
    ],
)
def test_refuses(butterfly, dtype, message):
    blocks = butterfly.init(jax.random.key(0), 2, 900)
    u = jnp.ones((1, 2, 900), dtype)
    with pytest.raises(NotImplementedError, match=message):
        learned_long_conv_mosaic_gpu(u, jnp.ones((2, 900)), blocks=blocks, butterfly=butterfly)
