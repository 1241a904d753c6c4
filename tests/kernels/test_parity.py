"""The fused kernel against float64 over the whole of `parity_table`: interpreted, and on a GPU if there is one.

A few of the interpreted combinations are in the fast lane: each mode with a class of lengths of its own, each dtype
twice. On a machine with a Hopper GPU, `python -m pytest -m gpu tests/kernels` runs all of them at
the sizes of a model, half a minute each, so that `-k` is of use; `tests/gpu.ini` is for one without the `dev` extra.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import long_conv
from tests.kernels import parity_table
from tests.kernels.parity_table import DIRECTIONS, DTYPES, LENGTHS, MODES
from tests.parity import cast

COMBINATIONS = list(itertools.product(enumerate(MODES), enumerate(LENGTHS), enumerate(DTYPES)))
BATCH, FEATURES = 64, 768


def in_the_fast_lane(mode: int, length: int, dtype: int) -> bool:
    """None of the largest, which take half a minute each: `test_fft_conv_values` has several blocks there."""
    return mode == length and mode % len(DTYPES) == dtype


def combinations():
    for (i, mode), (j, name), (k, dtype) in COMBINATIONS:
        marks = [] if in_the_fast_lane(i, j, k) else [pytest.mark.slow]
        yield pytest.param(mode, name, dtype, marks=marks, id=f"{mode}-{name}-{dtype}")


def test_the_fast_lane_has_some_of_everything():
    fast = [(i, j, k) for (i, _), (j, _), (k, _) in COMBINATIONS if in_the_fast_lane(i, j, k)]
    assert [i for i, _, _ in fast] == list(range(len(MODES)))
    assert [j for _, j, _ in fast] == list(range(len(LENGTHS) - 1))
    assert sorted(k for _, _, k in fast) == sorted([*range(len(DTYPES))] * 2)


@pytest.mark.parametrize(("mode", "name", "dtype"), list(combinations()))
def test_interpreted(mode, name, dtype):
    found = parity_table.by_direction(parity_table.errors(parity_table.case(mode, name), dtype))
    for direction, error in found.items():
        assert error < parity_table.tolerance(dtype), direction
        assert error < 1.5 * parity_table.measured()[mode, dtype, direction, name], f"{direction}: renew the table"


def test_every_measured_error_is_within_its_tolerance():
    measured = parity_table.measured()
    assert set(measured) == set(itertools.product(MODES, DTYPES, DIRECTIONS, LENGTHS))
    for line in parity_table.MEASURED.strip().splitlines()[1:]:
        _, dtype, _, tolerance, *errors = (cell.strip() for cell in line.split("|"))
        assert float(tolerance) == pytest.approx(1e3 * parity_table.tolerance(dtype))
        assert max(map(float, errors)) < float(tolerance), line


def repeated(array: np.ndarray | jax.Array) -> jax.Array:
    """As many features, the last axis but one, as a model has, of the few that are there: 768 is no multiple of 7."""
    return jnp.take(array, jnp.arange(FEATURES) % array.shape[-2], -2)


@pytest.fixture
def gpu() -> jax.Device:
    """A Hopper GPU."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("JAX finds no CUDA device")
    if device.compute_capability != "9.0":
        pytest.skip(f"the kernels are for Hopper; this is {device.device_kind}")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "name", "dtype"),
    [pytest.param(*one, id="-".join(one)) for one in itertools.product(MODES, LENGTHS, DTYPES)],
)
def test_on_a_gpu(mode, name, dtype, gpu):
    """Seven features are compared with `jnp.fft` in float64 on the CPU, and the others with the one they repeat."""
    case = parity_table.case(mode, name, batch=(BATCH,), features=7)
    convolve = functools.partial(long_conv, circular=case.circular)
    arrays = cast(case.arguments(), dtype)
    y = jax.eval_shape(lambda arrays: convolve(**arrays), arrays)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), dtype)

    def run(implementation, arrays, cotangent):
        named = functools.partial(convolve, implementation=implementation)
        return parity_table.values_and_gradients(named, arrays, cotangent)

    many = jax.tree.map(repeated, (arrays, cotangent))
    got = jax.jit(functools.partial(run, "mosaic_gpu"))(*many)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), (arrays, cotangent))
        want = jax.jit(functools.partial(run, "xla"))(*exact)
    want = jax.tree.map(lambda x: np.asarray(x, np.float32), want)
    error_of_y, errors = jax.tree.map(lambda got, want: float(device_error(got, want)), got, want)
    found = parity_table.by_direction({"y": error_of_y} | errors)
    print(f"{mode}, L = {case.length}, {dtype}: {found}")  # shown by -s
    for direction, error in found.items():
        assert error < parity_table.tolerance(dtype), direction


@jax.jit
def device_error(got, want):
    """|got - want| / |want| in L2 norm over every feature, on the device."""
    want = repeated(want)
    assert got.shape == want.shape
    return jnp.linalg.norm((got.astype(jnp.float32) - want).ravel()) / jnp.linalg.norm(want.ravel())
