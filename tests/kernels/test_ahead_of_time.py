"""Every kernel that ships compiles for Hopper, and uses no more registers and memory than `resources.json` says.

`test_resources` shows without a compiler that this table is of what ships.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flashbutterfly_jax import LearnedButterfly, learned_long_conv, long_conv
from pallas_kernels.fft_conv.config import SHARED_MEMORY_BYTES, Config, Kernel
from pallas_kernels.fft_conv.heuristic import heuristic
from tests.kernels import ahead_of_time, resources
from tests.kernels.programs import PROGRAMS, TYPICAL

pytestmark = pytest.mark.slow

needs_wheels = pytest.mark.skipif(
    ahead_of_time.versions() is None, reason=f"needs the cuda-aot extra, {', '.join(ahead_of_time.WHEELS)}"
)


@needs_wheels
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_no_program_uses_more_than_the_table_says(program):
    verdict = ahead_of_time.verdict(program)
    assert not verdict.notes
    known = resources.table()[str(program)]
    same_compiler = resources.versions() == ahead_of_time.versions()
    for figure in resources.FIGURES if same_compiler else ("stack", "spilled"):
        assert getattr(verdict, figure) <= known[figure], figure
    assert verdict.shared <= SHARED_MEMORY_BYTES


@needs_wheels
@pytest.mark.parametrize(
    "program",
    [program for program in TYPICAL if program.name != "spectrum" and isinstance(program.config, Config)],
    ids=str,
)
def test_what_the_heuristic_chooses_spills_no_more(program):
    chosen = dataclasses.replace(program, config=heuristic(Kernel(program.name), program.config.n2))
    verdict = ahead_of_time.verdict(chosen)
    assert not verdict.notes
    known = resources.table()[str(program)]
    assert (verdict.stack, verdict.spilled) <= (known["stack"], 1.1 * known["spilled"])


def fixed(u, kernel):
    return long_conv(u, kernel, implementation="mosaic_gpu").astype(jnp.float32).sum()


def learned(u, kernel):
    butterfly = LearnedButterfly("right_angle", (64, 16))
    blocks = butterfly.init(jax.random.key(0), features=4, taps=1024)
    y = learned_long_conv(u, kernel, blocks=blocks, butterfly=butterfly, implementation="mosaic_gpu")
    return y.astype(jnp.float32).sum()


def learned_in_three_passes(u, kernel):
    butterfly = LearnedButterfly("right_angle", (8, 64, 64))
    blocks = butterfly.init(jax.random.key(0), features=4, taps=32768)
    y = learned_long_conv(u, kernel, blocks=blocks, butterfly=butterfly, implementation="mosaic_gpu")
    return y.astype(jnp.float32).sum()


@needs_wheels
@pytest.mark.parametrize(
    ("total", "length", "launches", "summed"),
    [
        (fixed, 1024, 2, "f32[2,1,1,1024]"),  # the taps' spectrum, the gradient
        # the taps: split, spectrum, inverse, join; splits of u and of the cotangent, inner gradient, join
        (fixed, 40_000, 8, "f32[2,1,10,4096]"),
        (learned, 1024, 3, "f32[2,1024]"),  # the taps' spectrum, two launches of the gradient
        # the taps: split and rows, twice, and join; splits of u and of the cotangent, rows, join
        (learned_in_three_passes, 32768, 9, "f32[2,8,4096]"),
    ],
)
def test_a_sharded_gradient_sums_that_of_the_kernel_and_communicates_nothing_else(total, length, launches, summed):
    """Compiled for four GPUs of one host, two for the batch and two for the features.

    Where shardings are part of types, JAX 0.11 asks for a GPU to compile; lowering shows there that it partitions.
    """
    devices = np.array(ahead_of_time.devices(4)).reshape(2, 2)
    mesh = Mesh(devices, ("batch", "feature"), axis_types=(AxisType.Auto,) * 2)
    u_sharding, kernel_sharding = NamedSharding(mesh, P("batch", "feature")), NamedSharding(mesh, P("feature"))
    u = jax.ShapeDtypeStruct((8, 4, length), jnp.bfloat16, sharding=u_sharding)
    kernel = jax.ShapeDtypeStruct((4, length), jnp.float32, sharding=kernel_sharding)
    compiled = jax.jit(jax.grad(total, (0, 1))).lower(u, kernel).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == launches  # on each device
    operations = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    (results,) = re.findall(rf"= (.+?) (?:{operations})(?:-start)?\(", text)
    assert set(re.findall(r"\w+\[[\d,]*\]", results)) == {summed}  # of a device's features
    assert [spec.spec for spec in compiled.output_shardings] == [P("batch", "feature"), P("feature")]
