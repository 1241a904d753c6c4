"""Errors planted in the learned kernels, in a table or in the arithmetic, show in what `test_learned` compares."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv import learned_api, learned_backward_sm90
from pallas_kernels.fft_conv.config import Config
from tests.kernels.interpreter import interpreted
from tests.kernels.test_learned import _convolve, problem, relative_error, run
from tests.tolerances import FUSED

pytestmark = pytest.mark.slow

CONFIG = Config(16, 1, 1, blocks=1)
TABLES = "m", "n", "m_back", "n_back", "m_kernel", "n_kernel", "twiddle"
DTYPE = "bfloat16"


@pytest.fixture(autouse=True)
def no_traces_of_other_kernels():
    """JAX keeps traces by shapes: of right kernels for this test, and of wrong ones for the next."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def errors(got, want):
    return [relative_error(*pair) for pair in zip(*map(jax.tree.leaves, (got, want)), strict=True)]


def with_signs(operation, signs):
    """An operation's function of tables whose real and imaginary parts are multiplied by these signs."""
    right = operation.fun

    def changed(*operands):
        *arrays, shift, config = operands
        first = len(arrays) - len(TABLES)
        tables = (table * sign[:, None, None] for table, sign in zip(arrays[first:], signs, strict=True))
        return right(*arrays[:first], *tables, shift, config)

    return changed


def test_a_wrong_sign_in_any_table_shows_forward_and_in_the_cotangents():
    """In one interpreted program, with the signs for arguments."""
    arguments, g, butterfly, want = problem(16, 1024, 1, 1, DTYPE)
    forward, backward = learned_api._forward_op, learned_api._backward_op

    @jax.jit
    def both(signs, g, *arguments):
        with (
            mock.patch.object(forward, "fun", with_signs(forward, signs[0])),
            mock.patch.object(backward, "fun", with_signs(backward, signs[1])),
        ):
            y, vjp = jax.vjp(functools.partial(_convolve, butterfly=butterfly, config=CONFIG), *arguments)
            return y, vjp(g)

    right = np.ones((2, len(TABLES), 2), np.float32)
    with interpreted():
        assert max(errors(both(right, g, *arguments), want)) < FUSED[DTYPE]
        found = {}
        for way, table in np.ndindex(2, len(TABLES)):
            signs = right.copy()
            signs[way, table, 1] = -1
            y_error, *cotangents = errors(both(signs, g, *arguments), want)
            found["cotangents" if way else "forward", TABLES[table]] = (y_error, max(cotangents))
    # A wrong one of one way shows there, and leaves the other as it is, but for the taps' spectrum, which is kept.
    kept = {("forward", table) for table in ("m_kernel", "n_kernel", "twiddle")}
    assert all(pair[way == "cotangents"] > 2 * FUSED[DTYPE] for (way, _), pair in found.items()), found
    others = {key: pair[key[0] == "forward"] for key, pair in found.items()}
    assert {key for key, error in others.items() if error > FUSED[DTYPE]} == kept, found


def _conjugated(parts, n2, second=learned_backward_sm90.second_cotangent):
    return second(parts, n2) * jnp.array([1.0, -1.0])[:, None, None]


def _uncorrelated(a, b, c, d, re, im):
    a, b = learned_backward_sm90.floats(a, b)
    return re + a * c - b * d, im + a * d + b * c


STEPS = {
    "conjugate products": ("_by_conjugate", learned_backward_sm90._by),
    "products": ("_by", learned_backward_sm90._by_conjugate),
    "product of the spectra": ("correlate", _uncorrelated),
    "cotangent of the second block": ("second_cotangent", _conjugated),
}


@pytest.mark.parametrize("stage", STEPS)
def test_an_error_in_any_step_of_the_cotangents_shows(stage, monkeypatch):
    name, wrong = STEPS[stage]
    arguments, g, butterfly, want = problem(16, 1024, 1, 1, DTYPE)
    monkeypatch.setattr(learned_backward_sm90, name, wrong)
    y_error, *cotangents = errors(run(arguments, g, butterfly, CONFIG), want)
    assert y_error < FUSED[DTYPE]
    assert max(cotangents) > 2 * FUSED[DTYPE]
