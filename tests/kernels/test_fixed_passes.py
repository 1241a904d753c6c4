"""The fixed rival of learned blocks by their own passes, against `long_conv` in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import long_conv
from pallas_kernels.fixed_passes import fixed_in_three_passes
from tests.kernels.interpreter import interpreted
from tests.kernels.parity_table import relative_error
from tests.tolerances import FUSED


def both_ways(function):
    def run(u, taps, g):
        y, cotangents = jax.vjp(function, u, taps)
        return y, *cotangents(g)

    return jax.jit(run)


@pytest.mark.slow
def test_it_is_the_convolution_and_has_its_derivatives():
    """Of four rows of 2048 steps, half of what a copy moves."""
    length = 8192
    random = np.random.default_rng(0)
    u, g = (jnp.asarray(random.standard_normal((2, 2, length)), jnp.float16) for _ in range(2))
    taps = random.standard_normal((2, length)).astype(np.float32) / length**0.5
    with interpreted():
        got = both_ways(fixed_in_three_passes)(u, taps, g)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x, np.float64)) for x in (u, taps, g))
        want = both_ways(lambda u, taps: long_conv(u, taps, implementation="xla"))(*wide)
        want = jax.tree.map(np.asarray, want)
    errors = [relative_error(*both) for both in zip(got, want, strict=True)]
    assert max(errors) < FUSED["float16"], errors  # 7.6e-4


@pytest.mark.parametrize(
    ("length", "taps", "dtype", "names"),
    [
        (5000, (1, 5000), "bfloat16", "powers of two from 8192 to 4194304 steps; got u of 5000"),
        (4096, (1, 4096), "bfloat16", "got u of 4096"),
        (
            8192,
            (1, 8000),
            "bfloat16",
            r"taps of shape \(1, 8192\), one for each step; got u of bfloat16 and taps of shape",
        ),
        (8192, (1, 8192), "float32", "u must be bfloat16 or float16"),
    ],
)
def test_what_it_does_not_take_is_named(length, taps, dtype, names):
    u, taps = jax.ShapeDtypeStruct((1, 1, length), jnp.dtype(dtype)), jax.ShapeDtypeStruct(taps, jnp.float32)
    with pytest.raises(NotImplementedError, match=names):
        jax.eval_shape(fixed_in_three_passes, u, taps)
