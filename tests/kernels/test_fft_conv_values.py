"""The fused kernels in Pallas' interpreter against direct sums in float64: values, every gradient, no races.

An interpreted kernel takes seconds, most of them to be compiled for the CPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flashbutterfly_jax import long_conv
from pallas_kernels.fft_conv import api, kernel_sm90
from pallas_kernels.fft_conv.config import CONFIGS, N1, Config
from pallas_kernels.fft_conv.tables import dft_tables
from tests import tolerances
from tests.kernels.interpreter import interpreted
from tests.parity import Case, cast, direct_gradients, direct_sum

fused = functools.partial(long_conv, implementation="mosaic_gpu")

CASES = (
    # 257 is prime and K reaches beyond it; three rows in a tile of four
    (Case(257, 300, batch=(3,), features=1), "bfloat16"),
    (
        Case(1000, 300, True, True, channels=2, skip=True, pre_gate=True, post_gate="own", batch=(1, 1), features=1),
        "float16",
    ),
    (Case(2048, 2048, circular=True, pre_gate=True, batch=(3,), features=1), "bfloat16"),
    (Case(2049, 100, skip=True, batch=(), features=1), "float32"),
)
SLOW_CASES = (
    (Case(1024, 1024, bidirectional=True, batch=(5,), features=2), "float16"),
    (Case(1024, 7, True, channels=3, skip=True, post_gate="shared", batch=(5,), features=1), "bfloat16"),
    (Case(1025, 1024, True, pre_gate=True, post_gate="own", batch=(3,), features=3), "bfloat16"),
    (Case(2048, 5, channels=2, post_gate="shared", batch=(3,), features=2), "float16"),
    (Case(4096, 5000, True, True, channels=2, skip=True, pre_gate=True, batch=(1,), features=1), "float16"),
    (Case(4096, 4096, True, pre_gate=True, post_gate="shared", batch=(2,), features=2), "bfloat16"),
    (Case(300, 300, circular=True, skip=True, batch=(2, 3), features=2), "float32"),
)
SLOW = [pytest.param(*case, marks=pytest.mark.slow, id=f"{case[0]}-{case[1]}") for case in SLOW_CASES]
FAST = [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in CASES]


def relative_error(got, want) -> float:
    """|got - want| / |want| in L2 norm, in float64."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def tolerance(dtype: str) -> float:
    return tolerances.FUSED["float16" if dtype == "float16" else "bfloat16"]


def check(case: Case, dtype: str, convolve=None) -> None:
    """Values and all gradients in one interpreted program, whose kernels are compiled once."""
    arrays = cast(case.arguments(), dtype)
    convolve = convolve or functools.partial(fused, circular=case.circular)
    exact = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    want = direct_sum(**exact, circular=case.circular)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(want.shape), dtype)

    def values_and_gradients(arrays, cotangent):
        y, pull_back = jax.vjp(lambda arrays: convolve(**arrays), arrays)
        return y, pull_back(cotangent)[0]

    with interpreted():
        y, gradients = jax.jit(values_and_gradients)(arrays, cotangent)
    assert y.dtype == dtype
    assert relative_error(y, want) < tolerance(dtype)
    wanted = direct_gradients(np.asarray(cotangent, np.float64), **exact, circular=case.circular)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype, name
        assert relative_error(gradient, wanted[name]) < tolerance(dtype), name


@pytest.mark.parametrize(("case", "dtype"), [*FAST, *SLOW])
def test_values_and_gradients(case, dtype):
    check(case, dtype)


RINGS = {
    # three features for two blocks, of which one has nothing left to do; three tiles for two warpgroups likewise
    "two-slots": (Config(16, 2, 2, blocks=2), Case(512, 512, batch=(9,), features=3)),
    # four blocks share the only feature, each with one tile of its batch, the last with one row
    "shared-feature": (Config(16, 1, 1, blocks=4), Case(300, 4, batch=(13,), features=1)),
    "one-slot": (
        Config(16, 2, 1, blocks=2),
        Case(512, 4, channels=2, pre_gate=True, post_gate="own", batch=(9,), features=3),
    ),
}


@pytest.mark.parametrize("name", [*list(RINGS)[:2], pytest.param("one-slot", marks=pytest.mark.slow)])
def test_blocks_take_several_turns(name, monkeypatch):
    config, case = RINGS[name]
    for configs in CONFIGS.values():
        monkeypatch.setitem(configs, 16, config)
    check(case, "bfloat16")


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
def test_second_derivatives():
    u, kernel = cast(Case(256, 5, batch=(1,), features=1).arguments(), "float16").values()

    def curvature(convolve, u, kernel):
        def first(u, kernel):
            return jax.grad(lambda u: (convolve(u, kernel).astype(jnp.float32) ** 2).sum())(u)

        return jax.grad(lambda kernel: (first(u, kernel).astype(jnp.float32) ** 2).mean())(kernel)

    with interpreted():
        got = jax.jit(functools.partial(curvature, fused))(u, kernel)
    want = curvature(functools.partial(long_conv, implementation="xla"), u.astype(jnp.float32), kernel)
    assert relative_error(got, np.asarray(want, np.float64)) < tolerance("float16")


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


def _table_errors(f1, f2, twiddle):
    """Tables with one error each."""
    without_quarter = np.exp(-2j * np.pi * np.outer(np.arange(N1), np.arange(N1)) / N1) / 8
    plain = np.stack([without_quarter.real, without_quarter.imag])
    return {
        "sign of the first block": (f1 * np.array([1, -1] * (len(f1) // 2))[:, None, None], f2, twiddle),
        "quarter turn of the first block": (np.concatenate([plain] * (len(f1) // 2)), f2, twiddle),
        "sign of the twiddle": (f1, f2, twiddle * np.array([1, -1])[:, None, None]),
        "no twiddle": (f1, f2, np.stack([np.ones_like(twiddle[0]), np.zeros_like(twiddle[0])])),
        "sign of the second block": (f1, f2 * np.array([1, -1])[:, None, None], twiddle),
        "order of the second block": (f1, np.roll(f2, 1, axis=1), twiddle),
        "scale": (f1 * 1.01, f2, twiddle),
    }


def test_an_error_in_any_table_shows():
    """In one interpreted program, with the tables for arguments."""
    arrays = cast(Case(1024, 1024, batch=(1,), features=1).arguments(), "bfloat16")
    want = direct_sum(**{name: np.asarray(array, np.float64) for name, array in arrays.items()})
    u, taps = arrays["u"].reshape(1, 1, N1, 16), arrays["kernel"].reshape(1, 1, 1, 1024)
    tables = [np.asarray(table) for table in dft_tables(Config(16), jnp.float32)]
    errors = {}
    with interpreted():
        run = jax.jit(functools.partial(api._run_forward, gates=(False, False)))
        for name, planted in {"none": tables, **_table_errors(*tables)}.items():
            y = run(u, u, u[:, None], taps, *(jnp.asarray(t, jnp.float32) for t in planted), jnp.array([31], jnp.int32))
            errors[name] = relative_error(y.reshape(want.shape), want)
    assert errors.pop("none") < tolerance("bfloat16")
    assert all(error > 2 * tolerance("bfloat16") for error in errors.values()), errors


def _without_conjugate(z, w, dtype):
    return kernel_sm90._times(z, w, dtype)


def _uncorrelated(counts, a, b, c, d, re, im):
    a, b = (x.astype(jnp.float32) for x in (a, b))
    return re + a * c - b * d, im + a * d + b * c


def _not_conjugated(dtype, a, b, c, d):
    a, b = (x.astype(jnp.float32) for x in (a, b))
    return (a * c + b * d).astype(dtype), (a * d - b * c).astype(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (kernel_sm90, "_conj_times", _without_conjugate),
        (kernel_sm90, "_correlate", _uncorrelated),
        (kernel_sm90, "_conj_correlate", _not_conjugated),
    ],
)
def test_a_wrong_sign_in_a_kernel_shows(module, name, wrong, monkeypatch):
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError, match="relative_error"):
        check(Case(256, 256, batch=(1,), features=1), "bfloat16")
