"""Errors planted in each stage of the kernels, in its tables or in its arithmetic, show in what `test_parity` compares.

Stages: F1, twiddle, F2, spectrum of the taps, conjugate product, F2, twiddle and F1 again on the way back; products of
the gradients; gates; places of the taps.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv import (
    api,
    block_toeplitz,
    blocked_backward_sm90,
    blocked_sm90,
    chain,
    column_dft,
    kernel_sm90,
    spectrum_sm90,
)
from pallas_kernels.fft_conv.config import N1, Config
from pallas_kernels.fft_conv.tables import dft_tables
from tests.kernels.interpreter import interpreted
from tests.kernels.parity_table import errors, relative_error, tolerance
from tests.parity import Case, cast, direct_sum


@pytest.fixture(autouse=True)
def no_traces_of_other_kernels():
    """JAX keeps traces by shapes: of right kernels for this test, and of wrong ones for the next."""
    jax.clear_caches()
    yield
    jax.clear_caches()


SIGN = np.array([1, -1])[:, None, None]

NO_GATES = api._Gates(pre=False, post=False, both_ways=False)


def table_errors(f1, f2, twiddle, taps_sign):
    """The tables and the sign of the spectrum's planes, each time with one error."""
    without_quarter = np.exp(-2j * np.pi * np.outer(np.arange(N1), np.arange(N1)) / N1) / 8
    plain = np.stack([without_quarter.real, without_quarter.imag])
    there, back = np.split(f1, 2)
    return {
        "sign of the first block": (np.concatenate([there * SIGN, back]), f2, twiddle, taps_sign),
        "sign of the first block on the way back": (np.concatenate([there, back * SIGN]), f2, twiddle, taps_sign),
        "quarter turn of the first block": (np.concatenate([plain, plain]), f2, twiddle, taps_sign),
        "sign of the twiddle": (f1, f2, twiddle * SIGN, taps_sign),
        "no twiddle": (f1, f2, np.stack([np.ones_like(twiddle[0]), np.zeros_like(twiddle[0])]), taps_sign),
        "sign of the second block": (f1, f2 * SIGN, twiddle, taps_sign),
        "order of the second block": (f1, np.roll(f2, 1, axis=1), twiddle, taps_sign),
        "scale": (f1 * 1.01, f2, twiddle, taps_sign),
        "sign of the taps' spectrum": (f1, f2, twiddle, taps_sign * SIGN),
    }


def test_an_error_in_any_table_shows():
    """In one interpreted program, with the tables for arguments."""
    arrays = cast(Case(1024, 1024, batch=(1,), features=1).arguments(), "bfloat16")
    want = direct_sum(**{name: np.asarray(array, np.float64) for name, array in arrays.items()})
    u, taps = arrays["u"].reshape(1, 1, N1, 16), arrays["kernel"].reshape(1, 1, 1, 1024)
    tables = [*(np.asarray(table) for table in dft_tables(Config(16), jnp.float32)), np.ones((2, 1, 1))]
    spectra = api._spectra

    @jax.jit
    def run(f1, f2, twiddle, taps_sign):
        def signed(*arguments):
            return spectra(*arguments) * taps_sign.astype(u.dtype)

        with mock.patch.object(api, "_spectra", signed):
            return api._run_forward(u, u, u[:, None], taps, f1, f2, twiddle, jnp.array([31], jnp.int32), NO_GATES)

    found = {}
    with interpreted():
        for name, planted in {"none": tables, **table_errors(*tables)}.items():
            y = run(*(jnp.asarray(table, jnp.float32) for table in planted))
            found[name] = relative_error(y.reshape(want.shape), want)
    assert found.pop("none") < tolerance("bfloat16")
    assert all(error > 2 * tolerance("bfloat16") for error in found.values()), found


def _times_conjugate(z, w, dtype):
    """Z conj(w)."""

    def times(a, b, c, d):
        a, b, c, d = chain.floats(a, b, c, d)
        return (a * c + b * d).astype(dtype), (b * c - a * d).astype(dtype)

    return chain.by_columns(times, *z, *w)


def _split_times_conjugate(dtype):
    def times(a, b, c, d, c_low, d_low):
        c, d = c.astype(jnp.float32) + c_low, d.astype(jnp.float32) + d_low
        return *spectrum_sm90.split(a * c + b * d, dtype), *spectrum_sm90.split(b * c - a * d, dtype)

    return times


def _minus_on_the_way_back(butterfly, transposed=False, first_block=chain.Butterfly.first_block):
    re, im = first_block(butterfly, transposed)
    return (re, -im) if transposed else (re, im)


def _uncorrelated(a, b, c, d, re, im):
    a, b = chain.floats(a, b)
    return re + a * c - b * d, im + a * d + b * c


def _not_conjugated(dtype, a, b, c, d):
    a, b = chain.floats(a, b)
    return (a * c + b * d).astype(dtype), (a * d - b * c).astype(dtype)


def _negative(function):
    return lambda *arguments, **options: -function(*arguments, **options)


def _reverse_taps_with_minus(taps, reverse_taps, points, length, place=api._place):
    return place(taps, -reverse_taps, points, length)


def _later_blocks_forgotten(xs, ks, shapes, adjoint=False, products=block_toeplitz.block_products):
    return products(xs, [ks[0], *([0 * plane for plane in k] for k in ks[1:])], shapes, adjoint)


def _not_adjoint(xs, ks, shapes, adjoint=False, products=block_toeplitz.block_products):
    return products(xs, ks, shapes)


def _previous_lag(xs, gs, lag, correlations=blocked_backward_sm90._block_correlations):
    return correlations(xs, gs, lag - 1)


def _turned_the_other_way(z, radix_sums=column_dft.radix_sums):
    first, *others = radix_sums(z)
    return [first, *reversed(others)]


def _there_both_ways(table, zero, back, half=column_dft.half):
    return half(table, zero, False)


def _of_the_other_piece(planes, piece, twiddles=column_dft.twiddles):
    return twiddles(planes, 1 - piece)


PLAIN = Case(256, 256, batch=(1,), features=1)
GATED = Case(256, 256, pre_gate=True, batch=(1,), features=1)
WIDE = Case(3000, 3000, batch=(1,), features=1)
BLOCKS = Case(4100, 4100, batch=(1,), features=1)
BOTH_SIDES = Case(256, 256, bidirectional=True, batch=(1,), features=1)

# Stage -> the result that an error in it must show in, a case that has the stage, and what replaces what.
STEPS = {
    "twiddle": ("y", PLAIN, [(chain, "times", _times_conjugate)]),
    "conjugate of the product with the taps": ("y", PLAIN, [(kernel_sm90, "conj_times", chain.times)]),
    "twiddle on the way back": ("y", PLAIN, [(chain, "conj_times", chain.times)]),
    "last product": ("y", PLAIN, [(chain.Butterfly, "first_block", _minus_on_the_way_back)]),
    "radix-4 step": ("y", WIDE, [(column_dft, "radix_sums", _turned_the_other_way)]),
    "blocks of 16 points on the way back": ("y", WIDE, [(column_dft, "half", _there_both_ways)]),
    "order of the twiddles of 64 columns": ("y", WIDE, [(column_dft, "twiddles", _of_the_other_piece)]),
    "order of the frequencies of 64 columns": ("y", WIDE, [(column_dft, "in_order", lambda spectrum: spectrum)]),
    "twiddle of the taps": ("y", PLAIN, [(spectrum_sm90, "_times_split", _split_times_conjugate)]),
    "place of the reverse taps": ("y", BOTH_SIDES, [(api, "_place", _reverse_taps_with_minus)]),
    "gate": ("y", GATED, [(kernel_sm90, "apply_gate", _negative(chain.apply_gate))]),
    "product of the spectra of u and g": ("kernel", PLAIN, [(kernel_sm90, "correlate", _uncorrelated)]),
    "conjugate product of taps and g": ("u", PLAIN, [(kernel_sm90, "conj_correlate", _not_conjugated)]),
    "products of blocks": ("y", BLOCKS, [(blocked_sm90, "block_products", _later_blocks_forgotten)]),
    "products of blocks for u": ("u", BLOCKS, [(blocked_backward_sm90, "block_products", _not_adjoint)]),
    "products of blocks for the taps": (
        "kernel",
        BLOCKS,
        [(blocked_backward_sm90, "_block_correlations", _previous_lag)],
    ),
    "transform of the gradient of the taps": ("kernel", PLAIN, [(api, "tap_cotangent", _negative(api.tap_cotangent))]),
}
FAST = ("conjugate of the product with the taps", "last product", "radix-4 step", "product of the spectra of u and g")


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[] if stage in FAST else pytest.mark.slow) for stage in STEPS]
)
def test_an_error_in_any_step_shows(stage, monkeypatch):
    result, case, changes = STEPS[stage]
    for place, name, wrong in changes:
        monkeypatch.setattr(place, name, wrong)
    assert errors(case, "bfloat16")[result] > 2 * tolerance("bfloat16")
