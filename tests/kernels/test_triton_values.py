"""The Triton kernels, interpreted on the CPU, against float64: values and every gradient, and what surrounds them.

Needs the triton extra, which exists for Linux; there it is part of `dev`.
"""

import dataclasses
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flashbutterfly_jax import long_conv
from tests import tolerances
from tests.kernels import parity_table
from tests.parity import Case, cast, direct_gradients, direct_sum

if not sys.platform.startswith("linux"):
    pytest.skip("Triton is for Linux", allow_module_level=True)

from pallas_kernels.fft_conv import triton_plans
from pallas_kernels.fft_conv.triton_plans import CARDS, plan_for
from tests.kernels.triton_interpreter import interpreted, run_program

triton = functools.partial(long_conv, implementation="triton")
PLAIN = Case(999, 999, batch=(3,), features=1)
LONG = dataclasses.replace(PLAIN, length=4096, taps=4096, batch=(2,))
GATED = Case(1021, 1021, True, batch=(3,), channels=2, pre_gate=True, post_gate="own", features=1)

# (case, dtype, card): each mode, dtype, gate, plan, kind of kernels and class of lengths; those with more are slow.
CASES = [
    (Case(1, 1, batch=(1,), features=4), "bfloat16", "8.6"),
    (PLAIN, "bfloat16", "8.6"),
    (dataclasses.replace(PLAIN, length=1024, taps=300, bidirectional=True, batch=(1,)), "float16", "8.6"),
    (GATED, "bfloat16", "8.6"),
    (GATED, "bfloat16", "9.0"),
    (Case(3, 5, True, batch=(3,), features=2, skip=True), "float16", "9.0"),
    (PLAIN, "bfloat16", "9.0"),
    (PLAIN, "float32", "9.0"),
    (dataclasses.replace(PLAIN, length=2047, circular=True, batch=()), "bfloat16", "9.0"),
    (dataclasses.replace(LONG, batch=()), "bfloat16", "9.0"),
    (dataclasses.replace(LONG, batch=()), "bfloat16", "10.0"),
]
MORE = [
    *((GATED, dtype) for dtype in ("float16", "float32")),
    *((dataclasses.replace(GATED, length=n, taps=n, batch=(2,)), "bfloat16") for n in (1025, 2049, 4096, 4097, 8192)),
    *((dataclasses.replace(PLAIN, length=n, taps=n), "float16") for n in (2048, 4095, 8191, 8192)),
    (dataclasses.replace(PLAIN, length=4096, taps=4096, circular=True, pre_gate=True), "float32"),
    (dataclasses.replace(PLAIN, features=5, batch=(2, 3), post_gate="shared", channels=3), "bfloat16"),
]
SLOW = [(*one, card) for one in MORE for card in ("8.6", "9.0")]
SLOW += [(dataclasses.replace(GATED, length=n, taps=n, batch=(2,)), "bfloat16", "10.0") for n in (1024, 4000, 8000)]
SLOW += [(LONG, "float16", "10.0"), (dataclasses.replace(LONG, length=8192, taps=8192), "bfloat16", "10.0")]


def errors(case: Case, dtype: str, *changes: tuple[str, str], card: str) -> dict[str, float]:
    """The errors of y and, by name, of each gradient; with pieces of the kernels' source replaced."""
    arrays = cast(case.arguments(), dtype)
    exact = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    want = direct_sum(**exact, circular=case.circular)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(want.shape), dtype)
    convolve = functools.partial(triton, circular=case.circular)
    with interpreted(*changes, card=card):
        got = jax.jit(functools.partial(parity_table.values_and_gradients, convolve))(arrays, cotangent)
        y, gradients = jax.block_until_ready(got)
    assert y.dtype == dtype
    wanted = direct_gradients(np.asarray(cotangent, np.float64), **exact, circular=case.circular)
    assert gradients.keys() == wanted.keys()
    assert all(gradient.dtype == arrays[name].dtype for name, gradient in gradients.items())
    found = {name: parity_table.relative_error(gradient, wanted[name]) for name, gradient in gradients.items()}
    return {"y": parity_table.relative_error(y, want)} | found


@pytest.mark.parametrize(
    ("case", "dtype", "card"),
    [
        *(pytest.param(*one, id="-".join(map(str, one))) for one in CASES),
        *(pytest.param(*one, id="-".join(map(str, one)), marks=pytest.mark.slow) for one in SLOW),
    ],
)
def test_values_and_gradients(case, dtype, card):
    for name, error in errors(case, dtype, card=card).items():
        assert error < parity_table.tolerance(dtype), name


# What is wrong -> the card whose kernels have it, the result that must show it, and what replaces what in them.
PLANTED = {
    "sign of the product with the taps": ("8.6", "y", ("            d_im = -d_im\n", "")),
    "conjugate of the taps": ("8.6", "u", ("_times(c_re, -c_im, taps", "_times(c_re, c_im, taps")),
    "last product": ("8.6", "y", ("tl.load(at + N1 * N1), tl.dot(e_re", "tl.load(at), tl.dot(e_re")),
    "twiddle": ("8.6", "y", ("return a * c - b * d, a * d + b * c", "return a * c - b * d, a * d - b * c")),
    "sum over the batch": ("8.6", "kernel", ("sum_im += x_re * h_im - x_im * h_re", "sum_im += x_re * h_im")),
    "shares of the batch": ("8.6", "kernel", ("in range(part * TILES, ", "in range(0 * TILES, ")),
    "rows of the batch": (
        "8.6",
        "y",
        ("program // (CHANNELS * FEATURES) * ROWS", "program * 0"),
    ),
    "gate before": ("8.6", "pre_gate", ("other = y * _load(other_gate", "other = y * _load(x")),
    "sign of the imaginary part": ("9.0", "y", ("-(c_re * k_im + c_im * k_re)", "c_re * k_im + c_im * k_re")),
    "cotangent's taps": ("9.0", "u", ("places), True, N1", "places), False, N1")),
    "planes of the first product": ("9.0", "y", ("(2, K1, N2)), (1, 2, 0)", "(K1, 2, N2)), (0, 2, 1)")),
    "twiddle on the way back": ("9.0", "y", ("g_re * turn_im + g_im * turn_re", "g_re * turn_im - g_im * turn_re")),
    "sum over all rows": ("9.0", "kernel", ("sum_im += x_re * h_im - x_im * h_re", "sum_im += x_re * h_im")),
    "rows of a program": ("9.0", "y", ("x += X_STRIDE", "x += 0")),
    "the factor's share": ("9.0", "pre_gate", ("other = y * _load(x + at_x", "other = y * _load(factor + at_x")),
    "order of n2": ("10.0", "kernel", ("column // 8 % 2 * 2", "column // 8 % 2 * 0")),
    "parts in the halves of an integer": ("10.0", "kernel", ("(both >> 16)", "both")),
}
FAST = (
    "conjugate of the taps",
    "rows of the batch",
    "cotangent's taps",
    "rows of a program",
    "parts in the halves of an integer",
)


@pytest.mark.parametrize("what", [pytest.param(x, marks=[] if x in FAST else pytest.mark.slow) for x in PLANTED])
def test_an_error_in_any_step_shows(what, monkeypatch):
    card, result, change = PLANTED[what]
    monkeypatch.setattr(triton_plans, "_PROGRAMS", 1)  # so that a program has several rows
    case = GATED if result == "pre_gate" else LONG if card == "10.0" else PLAIN
    assert errors(case, "bfloat16", change, card=card)[result] > 2 * tolerances.FUSED["bfloat16"]


@pytest.mark.parametrize("card", ["8.6", "9.0"])
def test_a_nan_stays_in_its_row_and_an_odd_batch_is_not_read_past(card):
    case = dataclasses.replace(PLAIN, length=40, taps=40)
    arrays = cast(case.arguments(), "bfloat16")
    with interpreted(card=card):
        want = np.asarray(triton(**arrays), np.float32)
        y = np.asarray(triton(**arrays | {"u": arrays["u"].at[1, 0, 5].set(jnp.nan)}), np.float32)
    np.testing.assert_array_equal(y[::2], want[::2])
    assert np.isnan(y[1]).any()


@pytest.mark.parametrize(
    ("card", "length", "launches"),
    [("8.6", 9, ["correlate", "convolve"]), ("9.0", 9, ["backward"]), ("9.0", 2049, ["backward", "convolve"])],
)
def test_launches(card, length, launches):
    u, kernel = jnp.ones((2, 1, length), "bfloat16"), jnp.ones((2, 1, length))
    jax.clear_caches()
    with interpreted(card=card) as found:
        jax.eval_shape(triton, u, kernel)
        assert found == ["convolve"]
        jax.eval_shape(jax.grad(lambda u, k: triton(u, k).astype("float32").sum(), (0, 1)), u, kernel)
    assert found == ["convolve", *launches]  # JAX has traced the first one already


def test_vmap_is_more_features():
    arrays = cast(Case(20, 20, batch=(2,), features=2).arguments(), "float16")
    kernels = jnp.stack([arrays["kernel"], -2 * arrays["kernel"]])
    with interpreted() as launches:
        y = jax.vmap(triton, in_axes=(None, 0))(arrays["u"], kernels)
        once = triton(arrays["u"], arrays["kernel"])
    assert launches == ["convolve"] * 2
    np.testing.assert_array_equal(np.asarray(y), np.stack([once, -2 * once]))


def test_shard_map_sums_the_gradient_of_the_taps():
    arrays = cast(Case(20, 20, batch=(4,), features=2).arguments(), "float16")
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def gradient(u, kernel):
        return jax.grad(lambda kernel: triton(u, kernel).astype("float32").sum())(kernel)

    def summed(u, kernel):
        return jax.lax.psum(gradient(u, kernel), "batch")

    with interpreted():
        want = gradient(arrays["u"], arrays["kernel"])
        shards = jax.shard_map(summed, mesh=mesh, in_specs=(P("batch"), P()), out_specs=P(), check_vma=False)
        got = jax.jit(shards)(arrays["u"], arrays["kernel"])
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.slow
def test_second_derivatives():
    arrays = cast(Case(20, 20, batch=(2,), features=1, pre_gate=True, post_gate="shared").arguments(), "float32")

    def squares(implementation, arrays):
        def total(arrays):
            return (long_conv(**arrays, implementation=implementation) ** 2).sum()

        return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(total)(arrays)))

    with interpreted():
        got = jax.grad(functools.partial(squares, "triton"))(arrays)
    want = jax.grad(functools.partial(squares, "xla"))(arrays)
    for name in arrays:
        assert parity_table.relative_error(got[name], np.asarray(want[name], np.float64)) < 2e-2, name


@pytest.mark.slow
@pytest.mark.parametrize("card", ["8.0", "9.0"])
def test_offsets_past_32_bits(card):
    """The last program of 2**31 numbers and more; most of them are never touched, and take no memory."""
    plan = plan_for(4096, CARDS[card])
    features = 2**31 // plan.points + 1
    u = np.zeros((1, 1, features, plan.points), np.float16)
    u[0, 0, -1] = np.random.default_rng(0).standard_normal(plan.points)
    spectra = np.zeros((features, *jax.eval_shape(plan.spectra, jnp.ones((1, 1, plan.points))).shape), np.float16)
    spectra[-1] = plan.spectra(jnp.eye(1, plan.points)[None])  # of a single tap of 1 at lag 0
    tables = [np.asarray(table, np.float16) for table in plan.tables()]
    constants = {"BATCH": 1, "CHANNELS": 1, "FEATURES": features, "LENGTH": plan.points, "X_CHANNELS": 1, "ROWS": 1}
    constants |= dict.fromkeys(("FACTOR_CHANNELS", "GATE_CHANNELS", "OTHER_CHANNELS", "CONJUGATE"), 0)
    constants |= plan.constants("convolve", constants, u.itemsize)
    results = jax.ShapeDtypeStruct(u.shape, u.dtype), jax.ShapeDtypeStruct((1,), u.dtype)
    operands = [u, u, u, u, spectra, *tables]
    y, _ = run_program(plan.module, "convolve", operands, results, features - 1, constants)
    assert parity_table.relative_error(y[0, 0, -1], u[0, 0, -1].astype(np.float64)) < tolerances.FUSED["float16"]
    assert not y[0, 0, -2].any()


REFUSED = {
    "length": (
        (1, 1, CARDS["8.6"].longest + 1),
        "bfloat16",
        "at most 8192 steps on a GPU of compute capability 8.6, which",
    ),
    "dtype": ((1, 1, 8), "float64", "take bfloat16, float16 and float32; got float64"),
    "programs": ((2**17, 2**15, 1), "bfloat16", re.escape("fewer than 2**31 programs; this would be 2147483648")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_refuse_goes_elsewhere_unless_named(name):
    shape, dtype, reason = REFUSED[name]
    with jax.enable_x64(True), interpreted():
        u, kernel = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((shape[1], 1), "float32")
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(triton, u, kernel)
        jax.eval_shape(functools.partial(long_conv, implementation=("triton", "xla")), u, kernel)
