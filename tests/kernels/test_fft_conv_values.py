"""The fused kernels in Pallas' interpreter against direct sums in float64: what `test_parity` has no column for.

An interpreted kernel takes seconds, most of them to be compiled for the CPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flashbutterfly_jax import long_conv
from pallas_kernels.fft_conv import blocked
from pallas_kernels.fft_conv.config import Config, Kernel
from pallas_kernels.fft_conv.tuned import forced
from tests.kernels.interpreter import interpreted
from tests.kernels.parity_table import errors, relative_error, tolerance
from tests.parity import Case, cast, direct_gradients, direct_sum

fused = functools.partial(long_conv, implementation="mosaic_gpu")

CASES = (
    (
        Case(1000, 300, True, True, channels=2, skip=True, pre_gate=True, post_gate="own", batch=(1, 1), features=1),
        "float16",
    ),
)
SLOW_CASES = (
    # 257 is prime and K reaches beyond it; three rows in a tile of four
    (Case(257, 300, batch=(3,), features=1), "bfloat16"),
    (Case(2048, 2048, circular=True, pre_gate=True, batch=(3,), features=1), "bfloat16"),
    (Case(2049, 100, skip=True, batch=(), features=1), "float32"),
    (Case(1024, 1024, bidirectional=True, batch=(5,), features=2), "float16"),
    (Case(1024, 7, True, channels=3, skip=True, post_gate="shared", batch=(5,), features=1), "bfloat16"),
    (Case(1025, 1024, True, pre_gate=True, post_gate="own", batch=(3,), features=3), "bfloat16"),
    (Case(2048, 5, channels=2, post_gate="shared", batch=(3,), features=2), "float16"),
    (Case(4096, 5000, True, True, channels=2, skip=True, pre_gate=True, batch=(1,), features=1), "float16"),
    (Case(4096, 4096, True, pre_gate=True, post_gate="shared", batch=(2,), features=2), "bfloat16"),
    (Case(300, 300, circular=True, skip=True, batch=(2, 3), features=2), "float32"),
    # tiles without a step or a row that is missing, which one copy moves
    (Case(1024, 1024, pre_gate=True, post_gate="own", batch=(8,), features=2), "bfloat16"),
    (Case(2048, 2048, True, channels=2, post_gate="shared", batch=(4,), features=2), "float16"),
)
SLOW = [pytest.param(*case, marks=pytest.mark.slow, id=f"{case[0]}-{case[1]}") for case in SLOW_CASES]
FAST = [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in CASES]


def check(case: Case, dtype: str, convolve=None) -> None:
    """Values and all gradients."""
    for name, error in errors(case, dtype, convolve).items():
        assert error < tolerance(dtype), name


@pytest.mark.parametrize(("case", "dtype"), [*FAST, *SLOW])
def test_values_and_gradients(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("length", [pytest.param(2000, marks=pytest.mark.slow), 3000])
def test_large_constants_stay_in_the_range_of_float16(length):
    """All of them meet in one frequency, whose intermediates are the largest there are, 7.2 times as large."""
    u = jnp.full((1, 1, length), 8000.0, jnp.float16)
    with interpreted():
        y = jax.jit(fused)(u, jnp.full((1, 1), 0.1))
    assert relative_error(y, 0.1 * np.asarray(u, np.float64)) < tolerance("float16")  # 3.7e-4


RINGS = {
    # three features for two blocks, of which one has nothing left to do; three tiles for two warpgroups likewise
    "two-slots": (Config(16, 2, 2, blocks=2), Case(512, 512, batch=(9,), features=3)),
    # four blocks share the only feature, each with one tile of its batch, the last with one row
    "shared-feature": (Config(16, 1, 1, blocks=4), Case(300, 4, batch=(13,), features=1)),
    "one-slot": (
        Config(16, 2, 1, blocks=2),
        Case(512, 4, channels=2, pre_gate=True, post_gate="own", batch=(9,), features=3),
    ),
    # a block's only warpgroup takes all turns: a tile that is full and one that is not, of two features; rows end early
    "gated-1024": (
        Config(16, 1, blocks=1),
        Case(300, 300, channels=2, pre_gate=True, post_gate="shared", batch=(7,), features=1),
    ),
    "gated-2048": (
        Config(32, 1, 1, blocks=1),
        Case(1100, 40, True, pre_gate=True, post_gate="own", batch=(3,), features=2),
    ),
    "gated-4096": (Config(64, 1, 1, blocks=1), Case(2100, 9, pre_gate=True, post_gate="own", batch=(2,), features=2)),
    "pre-gate-4096": (Config(64, 1, 1, blocks=1), Case(2100, 9, pre_gate=True, batch=(2,), features=2)),
    "post-gate-4096": (
        Config(64, 1, blocks=1),
        Case(2100, 9, channels=2, post_gate="shared", batch=(2,), features=1),
    ),
    "pre-gate-1024": (Config(16, 2, blocks=1), Case(520, 9, pre_gate=True, batch=(13,), features=1)),
    "post-gate-1024": (Config(16, 2, blocks=1), Case(520, 9, post_gate="own", batch=(13,), features=1)),
}
SLOW_RINGS = (
    "one-slot",
    "gated-2048",
    "gated-4096",
    "pre-gate-4096",
    "post-gate-4096",
    "pre-gate-1024",
    "post-gate-1024",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_RINGS)) for name in RINGS]
)
def test_blocks_take_several_turns(name):
    config, case = RINGS[name]
    with forced({(kernel, config.n2): config for kernel in Kernel}):
        check(case, "bfloat16")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(4100, 4100, batch=(3,), features=2), "bfloat16"),
        pytest.param(Case(12000, 12000, pre_gate=True, batch=(2,), features=1), "bfloat16", marks=pytest.mark.slow),
        pytest.param(
            Case(8192, 9000, True, channels=2, pre_gate=True, post_gate="own", batch=(3,), features=1),
            "float16",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case(12000, 40, circular=True, post_gate="shared", batch=(2,), features=1),
            "bfloat16",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case(16384, 16384, True, pre_gate=True, batch=(2,), features=1), "bfloat16", marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_sequences_of_several_blocks(case, dtype, monkeypatch):
    """One block of the grid takes all rows, so that every ring wraps."""
    shapes = blocked._shapes
    monkeypatch.setattr(blocked, "_shapes", lambda *x: dataclasses.replace(shapes(*x), blocks=1))
    check(case, dtype)


@pytest.mark.slow
def test_vmap_over_both():
    case = Case(256, 256, batch=(2,), features=1)
    arrays = [cast(case.arguments(seed), "float16") for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    with interpreted():
        y = jax.jit(jax.vmap(lambda arrays: fused(**arrays)))(stacked)
    for got, one in zip(y, arrays, strict=True):
        want = direct_sum(**{name: np.asarray(array, np.float64) for name, array in one.items()})
        assert relative_error(got, want) < tolerance("float16")


@pytest.mark.slow
def test_shard_map():
    mesh = jax.make_mesh((2, 2), ("batch", "feature"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = P("batch", "feature"), P("feature")

    def convolve(u, kernel):
        return jax.shard_map(fused, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(u, kernel)

    check(Case(256, 256, batch=(2,), features=2), "bfloat16", convolve)


@pytest.mark.slow
@pytest.mark.parametrize("gates", [{}, {"pre_gate": True, "post_gate": "own"}], ids=["plain", "gated"])
def test_second_derivatives(gates):
    arrays = cast(Case(256, 5, batch=(1,), features=1, **gates).arguments(), "float16")

    def curvature(convolve, arrays):
        def first(arrays):
            gradients = jax.grad(lambda arrays: (convolve(**arrays).astype(jnp.float32) ** 2).sum())(arrays)
            return sum((gradients[name].astype(jnp.float32) ** 2).mean() for name in gradients if name != "kernel")

        return jax.grad(first)(arrays)

    with interpreted():
        got = jax.jit(functools.partial(curvature, fused))(arrays)
    exact = {name: array.astype(jnp.float32) for name, array in arrays.items()}
    want = curvature(functools.partial(long_conv, implementation="xla"), exact)
    for name in arrays:
        assert relative_error(got[name], np.asarray(want[name], np.float64)) < tolerance("float16"), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
def test_what_is_not_a_number_stays_in_its_row():
    """Rows 0 to 3 share a tile, and row 4 fills the next alone; of each, one row of one feature is spoilt."""
    case = Case(256, 256, batch=(5,), features=2)
    arrays = cast(case.arguments(), "bfloat16")
    spoilt = [(1, 0), (4, 1)]
    u, kernel = np.asarray(arrays["u"], np.float64), np.asarray(arrays["kernel"], np.float64)
    u_with, g_with = arrays["u"].at[1, 0, 5].set(jnp.nan), arrays["u"].at[1, 0, 7].set(-jnp.inf)
    u_with, g_with = u_with.at[4, 1, 0].set(jnp.inf), g_with.at[4, 1, 200].set(jnp.nan)

    def values_and_gradients(u, kernel, g):
        y, pull_back = jax.vjp(fused, u, kernel)
        return y, *pull_back(g)

    with interpreted():
        y, d_u, d_kernel = jax.jit(values_and_gradients)(u_with, arrays["kernel"], g_with)
    for got, want in ((y, direct_sum(u, kernel)), (d_u, direct_gradients(u, u, kernel)["u"])):
        for row in np.ndindex(5, 2):
            if row in spoilt:
                assert not np.isfinite(got[row]).all(), row
            else:
                assert relative_error(got[row], want[row]) < tolerance("bfloat16"), row
    assert not np.isfinite(d_kernel).any()  # each feature has a spoilt row, and a kernel's gradient sums over all
