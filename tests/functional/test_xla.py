"""`implementation="xla"`: against the direct sum, and the work it asks of XLA."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbutterfly_jax import long_conv
from flashbutterfly_jax.functional.reference import long_conv_reference
from flashbutterfly_jax.functional.xla import _fft_size
from tests import tolerances
from tests.parity import CASES, Case, ParitySuite, cast, direct_sum, relative_error


class TestXla(ParitySuite):
    implementation = "xla"


@pytest.mark.parametrize("case", [case for case in CASES if case.channels == 2], ids=str)
def test_reference(case):
    with jax.enable_x64(True):
        exact = case.arguments()
        want = direct_sum(**exact, circular=case.circular)
        arrays = cast(exact, "float64")
        if case.post_gate == "shared":
            arrays["post_gate"] = arrays["post_gate"][..., None, :, :]
        got = long_conv_reference(**{"skip": None} | arrays, circular=case.circular)
    assert relative_error(got, want) < tolerances.FORWARD["xla"]["float64"]


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    case=st.builds(
        Case,
        length=st.integers(1, 40),
        taps=st.integers(1, 90),
        bidirectional=st.booleans(),
        circular=st.booleans(),
        channels=st.sampled_from([None, 1, 2]),
        skip=st.booleans(),
        pre_gate=st.booleans(),
        post_gate=st.sampled_from([None, "shared", "own"]),
        batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
        features=st.integers(1, 3),
    ),
    seed=st.integers(0, 2**16),
)
def test_random_requests(case, seed):
    exact = case.arguments(seed)
    got = long_conv(**cast(exact, "float32"), circular=case.circular, implementation="xla")
    # Random tiny cases can cancel, so the error is measured against what is summed.
    scale = direct_sum(**{name: np.abs(array) for name, array in exact.items()}, circular=case.circular).max()
    error = np.abs(np.asarray(got, np.float64) - direct_sum(**exact, circular=case.circular)).max()
    assert error < tolerances.FORWARD["xla"]["float32"] * scale


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(length=st.integers(1, 70000), taps=st.integers(1, 140000), bidirectional=st.booleans())
def test_fft_size_is_fast_and_long_enough(length, taps, bidirectional):
    n = _fft_size(length, taps, bidirectional=bidirectional, circular=False)
    reach = max(min(taps, length) - 1, min(taps, length - 1) if bidirectional else 0)
    assert length + reach <= n <= 1.07 * (length + reach) + 2  # the sparsest stretch above 2 is 7-smooth within 7 %
    assert 2**60 * 3**40 * 5**30 * 7**25 % n == 0
    assert n % 2 == 0
    assert _fft_size(length, taps, bidirectional=bidirectional, circular=True) == length


def transforms(function, *arrays) -> list[tuple[str, str]]:
    """Kind and shape of every FFT, in the order of the program: the shape of the real side."""
    text = jax.jit(function).lower(*arrays).compile().as_text()  # before, a function may hold one that is called twice
    found = re.findall(r"= [cf]\d+\[(\d+),\d+\].* fft\(.*fft_type=(\w+), fft_length={(\d+)}", text)
    assert len(found) == text.count(" fft(")
    return [(kind, f"{rows}x{length}") for rows, kind, length in found]


def half_square(u, kernel, reverse_kernel=None):
    return 0.5 * jnp.sum(long_conv(u, kernel, reverse_kernel=reverse_kernel) ** 2)


@pytest.mark.parametrize("channels", [None, 5])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_rows_transformed_are_the_fewest(channels, bidirectional):
    """Forward: those of u, whatever the channels, and of the kernel, then of the result. The gradient adds those of the
    result's and of both of its own, after the sum over the batch.
    """
    u, kernel = jnp.ones((2, 3, 64)), jnp.ones((channels, 3, 64) if channels else (3, 64))
    arrays = (u, kernel, kernel) if bidirectional else (u, kernel)
    results = channels or 1
    there, back = ("RFFT", f"{2 * 3 + results * 3}x128"), ("IRFFT", f"{2 * results * 3}x128")
    assert transforms(half_square, *arrays) == [there, back]
    gradient = jax.grad(half_square, argnums=tuple(range(len(arrays))))
    assert transforms(gradient, *arrays) == [there, back, ("RFFT", back[1]), ("IRFFT", there[1])]
    assert transforms(jax.grad(half_square), *arrays) == [there, back, ("RFFT", back[1]), ("IRFFT", "6x128")]


@pytest.mark.parametrize("differentiated", [False, True])
def test_no_two_ffts_of_a_stack_can_run_at_once(differentiated):
    """XLA's CPU runtime hangs where enough do: see `flashbutterfly_jax.functional.spectral`."""

    def stack(u, kernels):
        for kernel in kernels:
            u = jnp.tanh(long_conv(u, kernel).sum(-3))
        return u.sum()

    function = jax.grad(stack, argnums=(0, 1)) if differentiated else stack
    compiled = jax.jit(function).lower(jnp.ones((2, 3, 64)), [jnp.ones((2, 3, 64))] * 3).compile()
    lines = re.findall(r"^  (?:ROOT )?%(\S+) = (.*)$", compiled.as_text().split("\nENTRY")[1], re.MULTILINE)
    ffts: dict[str, set[str]] = {}  # name -> the FFTs it waits for
    waits: dict[str, set[str]] = {}
    for name, expression in lines:  # operands come before what uses them
        waits[name] = set().union(
            *(waits[o] | ({o} & ffts.keys()) for o in re.findall(r"%([\w.-]+)", expression) if o in waits)
        )
        if " fft(" in expression:
            ffts[name] = waits[name]
    assert sorted(map(len, ffts.values())) == list(range(12 if differentiated else 6))
