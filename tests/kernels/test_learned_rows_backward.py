"""The backward kernel of learned rows: every cotangent against float64, interpreted, and planted errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv import learned_rows_backward_sm90 as kernels
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.learned_rows import Shapes
from tests.kernels.interpreter import interpreted
from tests.tolerances import FUSED

SHIFT = jnp.array([31], jnp.int32)


def complex_of(planes):
    """`(..., re | im, 64, 64)` as complex numbers."""
    planes = np.asarray(planes, np.float64)
    return planes[..., 0, :, :] + 1j * planes[..., 1, :, :]


def rows_of(sequences):
    """`(B, 1, D, re | im m, 64, 64)` as complex numbers `(B, D, m, 64, 64)`."""
    batch, _, features, rows, *_ = sequences.shape
    return complex_of(np.asarray(sequences).reshape(batch, features, 2, rows // 2, N1, TILE).swapaxes(2, 3))


def errors(batch, features, rows, blocks, dtype):
    """Relative errors of dz, w, dM, dN and dK, with any blocks and any twiddles."""
    random = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        return jnp.asarray(random.standard_normal(shape) * scale, dtype)

    shapes = Shapes(batch, features, rows, jnp.dtype(dtype), blocks)
    z, h = draw(*shapes.sequences.shape), draw(*shapes.sequences.shape)
    spectrum = draw(features, rows, 2, N1, TILE)
    m, n = draw(2, rows, 2, N1, N1, scale=1 / 8), draw(2, 2, N1, N1, scale=1 / 8)
    angle = random.uniform(0, 2 * np.pi, (rows, N1, TILE))
    twiddle = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1), dtype)
    with interpreted():
        dz, w, *parts = jax.jit(kernels.backward(shapes))(z, h, spectrum, SHIFT, m, n, twiddle)

    m, n, k, t = map(complex_of, (m, n, spectrum, twiddle))
    x = np.stack([rows_of(z), rows_of(h)])
    b = t * np.einsum("srpk,sbdrkm->sbdrpm", m, x)
    spectra = np.einsum("sbdrpm,smc->sbdrpc", b, n)
    c = np.stack([k.conj() * spectra[1], k * spectra[0]])
    a = t.conj() * np.einsum("sbdrpc,smc->sbdrpm", c, n.conj())
    want = (
        *np.einsum("srpk,sbdrpm->sbdrkm", m.conj(), a),
        np.einsum("sbdrpm,sbdrkm->rspk", a, x.conj()),
        np.einsum("sbdrpm,sbdrpc->rsmc", b.conj(), c),
        (spectra[0].conj() * spectra[1]).sum(0),
    )
    got = rows_of(dz), rows_of(w), *(complex_of(part.sum(0)) for part in parts)
    return [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(got, want, strict=True)]


@pytest.mark.parametrize(
    ("batch", "features", "rows", "blocks", "dtype"),
    [
        (2, 1, 2, 2, "bfloat16"),
        # two blocks for three features of each row, of which the second has one less, and all places of rows
        pytest.param(4, 3, 2, 5, "float16", marks=pytest.mark.slow),
        # more blocks than features: they share a batch that does not divide
        pytest.param(3, 1, 3, 6, "bfloat16", marks=pytest.mark.slow),
        # 5 sequences by two blocks of each row: the second has a step without work
        pytest.param(5, 1, 1, 2, "float16", marks=pytest.mark.slow),
    ],
)
def test_every_cotangent(batch, features, rows, blocks, dtype):
    found = errors(batch, features, rows, blocks, dtype)
    print(found)
    assert max(found) < FUSED[dtype], found
