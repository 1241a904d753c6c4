"""The kernel of the taps' spectra by learned blocks, interpreted, against float64; and planted errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv import learned_rows_forward_sm90, learned_rows_transform_sm90
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.learned_rows import Shapes
from tests.kernels.interpreter import interpreted
from tests.kernels.test_learned_rows_forward import PLANTED, SHIFT, complex_of, rows_of
from tests.tolerances import FUSED


def error(batch, m, blocks, dtype):
    """The relative error of spectra in that dtype, with any blocks and any twiddles."""
    random = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        return jnp.asarray(random.standard_normal(shape) * scale, jnp.float16)

    z, f1, f2 = draw(batch, 1, 1, 2 * m, N1, TILE), draw(m, 2, N1, N1, scale=1 / 8), draw(2, N1, N1, scale=1 / 8)
    angle = random.uniform(0, 2 * np.pi, (m, N1, TILE))
    twiddle = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1), jnp.float16)
    scale = jnp.asarray(random.uniform(0.5, 2, batch), jnp.float32)
    shapes = Shapes(batch, 1, m, jnp.dtype("float16"), blocks)
    kernel = learned_rows_transform_sm90.transform(shapes, jnp.dtype(dtype))
    with interpreted():
        got = jax.jit(kernel)(z, scale, jnp.concatenate([f1, -f1[:, 1:]], 1), f2, twiddle, SHIFT)
    assert got.dtype == dtype

    f1, f2, t, got = map(complex_of, (f1, f2, twiddle, got.astype(jnp.float32)))
    want = (t * (f1 @ rows_of(z, m)[:, 0])) @ f2 * np.asarray(scale, np.float64)[:, None, None, None]
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize(
    ("batch", "m", "blocks", "dtype"),
    [
        (2, 2, 2, "bfloat16"),
        # five by one block, the second of two turns in part
        pytest.param(5, 1, 1, "float16", marks=pytest.mark.slow),
        # blocks that share a batch which does not divide
        pytest.param(7, 3, 6, "float16", marks=pytest.mark.slow),
    ],
)
def test_values(batch, m, blocks, dtype):
    found = error(batch, m, blocks, dtype)
    assert found < FUSED[dtype], found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLANTED if name != "_times_conjugate"])
def test_an_error_in_any_step_shows(name, monkeypatch):
    monkeypatch.setattr(learned_rows_forward_sm90, name, PLANTED[name])
    assert error(1, 1, 1, "float16") > 2 * FUSED["float16"]
