"""`implementation="xla"`: against the direct sum, and the work it asks of XLA."""

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


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_number_of_transforms_is_the_smallest(channels, bidirectional):
    """Forward: u, kernel and back. The gradient adds three: of the result's, back to u and back to the kernel."""
    arrays = cast(Case(64, 64, bidirectional, channels=channels, skip=True).arguments(), "float32")

    def transforms(f) -> list[tuple[int, ...]]:
        text = jax.jit(f).lower(arrays).as_text()
        assert "type = FFT" not in text.replace("type = RFFT", "").replace("type = IRFFT", "")
        return text.count("stablehlo.fft")

    assert transforms(lambda arrays: long_conv(**arrays)) == 3
    assert transforms(jax.grad(lambda arrays: jnp.sum(long_conv(**arrays) ** 2))) == 6


def test_channels_share_one_transform_of_u():
    u, kernel = jnp.ones((2, 3, 64)), jnp.ones((5, 3, 64))
    text = jax.jit(long_conv).lower(u, kernel).as_text()
    forward = [line.split("->")[0].split("tensor")[-1].strip() for line in text.splitlines() if "type = RFFT" in line]
    assert sorted(forward) == ["<2x3x128xf32>)", "<5x3x128xf32>)"], forward


def test_the_batch_is_summed_before_the_kernel_gradient_is_transformed_back():
    u, kernel = jnp.ones((7, 3, 64)), jnp.ones((3, 64))
    gradient = jax.grad(lambda u, kernel: jnp.sum(long_conv(u, kernel) ** 2), argnums=1)
    lines = jax.jit(gradient).lower(u, kernel).as_text().splitlines()
    back = [line.split("->")[-1].strip() for line in lines if "type = IRFFT" in line]
    assert back == ["tensor<7x1x3x128xf32>", "tensor<1x3x128xf32>"], back
