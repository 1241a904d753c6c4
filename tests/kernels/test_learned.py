"""Kernels with learned blocks: their values in the interpreter, programs for a GPU, and what compiling them says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import LearnedButterfly, learned_long_conv
from flashbutterfly_jax.functional.butterfly import (
    Chain,
    learned_reference_forward,
    learned_reference_spectrum,
)
from flashbutterfly_jax.functional.butterfly.mosaic_gpu import learned_long_conv_mosaic_gpu
from pallas_kernels.fft_conv import learned_api, learned_backward_sm90, learned_sm90
from pallas_kernels.fft_conv.config import N1, SHARED_MEMORY_BYTES, Config
from pallas_kernels.fft_conv.kernel_sm90 import Shapes
from tests.kernels import ahead_of_time
from tests.kernels.interpreter import interpreted
from tests.kernels.programs import DTYPES, FEATURES, Program
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
    # a tile of four rows and one of one, over two features; rows that end early
    "1024": (Config(16, 1, 1, blocks=1), (16, 900, 5, 2, "bfloat16")),
    # two blocks for three features; two warpgroups take turns
    "1024-blocks": (Config(16, 2, 2, blocks=2), (16, 1024, 9, 3, "float16")),
    "2048": (Config(32, 2, 2, blocks=1), (32, 1100, 3, 2, "bfloat16")),
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


def _build(program):
    config, options, dtype = program.config, program.options, jnp.dtype(program.dtype)
    shapes = Shapes(64 - options, 1, FEATURES, N1 - 8 * options, dtype)
    u = jax.ShapeDtypeStruct((shapes.batch, FEATURES, shapes.length, config.n2), dtype)
    spectrum = jax.ShapeDtypeStruct((FEATURES, 2, N1, config.n2), dtype)
    first, second, twiddle = (2, N1, N1), (2, config.n2, 2 * config.n2), (2, N1, config.n2)
    tables = [jax.ShapeDtypeStruct(shape, dtype) for shape in (first, second, first, second, twiddle)]
    return learned_sm90.forward(config, shapes), (u, spectrum, *tables, jax.ShapeDtypeStruct((1,), jnp.int32))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One of the backward kernel's."""

    n2: int
    index: int

    @property
    def wanted(self) -> learned_backward_sm90.Wanted:
        return learned_backward_sm90.launches(self.n2)[self.index]

    @property
    def config(self) -> Config:
        return learned_backward_sm90.default_config(self.n2, self.wanted)

    def __str__(self) -> str:
        return f"n2 = {self.n2}, launch {self.index + 1}"


def _build_backward(program):
    launch, options, dtype = program.config, program.options, jnp.dtype(program.dtype)
    shapes = Shapes(64 - options, 1, FEATURES, N1 - 8 * options, dtype)
    rows = jax.ShapeDtypeStruct((shapes.batch, FEATURES, shapes.length, launch.n2), dtype)
    spectrum = jax.ShapeDtypeStruct((FEATURES, 2, N1, launch.n2), dtype)
    real_form = 2, launch.n2, 2 * launch.n2
    table_shapes = {"first": (2, N1, N1), "second": real_form, "back": real_form, "twiddle": (2, N1, launch.n2)}
    tables = [jax.ShapeDtypeStruct(table_shapes[name.split("_")[-1]], dtype) for name in launch.wanted.tables]
    kernel = learned_backward_sm90.backward(launch.config, shapes, launch.wanted)
    return kernel, (rows, rows, spectrum, jax.ShapeDtypeStruct((1,), jnp.int32), *tables)


SPILLS = {  # at most: bytes of the stack, bytes spilled to it and read back
    "n2 = 32, launch 2": (8, 16),
    "n2 = 64, launch 1": (72, 200),
    "n2 = 64, launch 2": (16, 32),
}
FORWARD = [
    Program("learned forward", _build, learned_sm90.default_config(n2), dtype, options, "learned_fft_conv_forward")
    for n2 in (16, 32, 64)
    for dtype in DTYPES
    for options in (False, True)
]
BACKWARD = [
    Program("learned backward", _build_backward, Launch(n2, index), dtype, options, "learned_fft_conv_backward")
    for n2 in (16, 32, 64)
    for index in range(len(learned_backward_sm90.launches(n2)))
    for dtype in DTYPES
    for options in (False, True)
]


def _memory(program):
    if program in FORWARD:
        return learned_sm90.shared_memory(program.config)
    return learned_backward_sm90.shared_memory(program.config.config, program.config.wanted)


_QUICK = {"learned forward, n2 = 16", "learned backward, n2 = 64, launch 3"}  # to lower


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(p, marks=() if str(p).rsplit(", ", 2)[0] in _QUICK else pytest.mark.slow, id=str(p))
        for p in FORWARD + BACKWARD
        if p.dtype == "bfloat16" and p.options
    ],
)
def test_lowers_for_a_gpu(program):
    kernel, operands = program.build()
    text = jax.jit(kernel).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert _memory(program) + 1024 <= SHARED_MEMORY_BYTES


@pytest.mark.slow
@pytest.mark.skipif(
    ahead_of_time.versions() is None, reason=f"needs the cuda-aot extra, {', '.join(ahead_of_time.WHEELS)}"
)
@pytest.mark.parametrize("program", FORWARD + BACKWARD, ids=str)
def test_compiles_and_spills_little(program):
    verdict = ahead_of_time.verdict(program)
    stack, spilled = SPILLS.get(str(program.config), (0, 0))
    assert verdict.stack <= stack
    assert verdict.spilled <= spilled
    assert verdict.shared == _memory(program)
    assert not verdict.notes


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
