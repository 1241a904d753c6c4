"""The backward kernel by pairs of warpgroups: every cotangent against float64, interpreted, and planted errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv import learned_paired_sm90
from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.tiles import Shapes
from tests.kernels.interpreter import interpreted
from tests.tolerances import FUSED

SHIFT = jnp.array([31], jnp.int32)


def complex_of(planes):
    """`(..., re | im, 64, 64)` as complex numbers."""
    planes = np.asarray(planes, np.float64)
    return planes[..., 0, :, :] + 1j * planes[..., 1, :, :]


def errors(batch, features, length, blocks, dtype):
    """Relative errors of du, dM, dN and dK, with any blocks and any twiddle."""
    random = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        return jnp.asarray(random.standard_normal(shape) * scale, dtype)

    u, g = draw(batch, features, length, TILE), draw(batch, features, length, TILE)
    spectrum, m, n = draw(features, 2, N1, TILE), draw(2, 2, N1, N1, scale=1 / 8), draw(2, 2, N1, N1, scale=1 / 8)
    angle = random.uniform(0, 2 * np.pi, (N1, TILE))
    twiddle = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)]), dtype)
    kernel = learned_paired_sm90.backward(Shapes(batch, 1, features, length, jnp.dtype(dtype)), blocks)
    with interpreted():
        du, *parts = jax.jit(kernel)(u, g, spectrum, SHIFT, m, n, twiddle)

    m, n, k, t = map(complex_of, (m, n, spectrum, twiddle))
    rows = np.stack([np.asarray(x, np.float64) for x in (u, g)])
    rows = np.pad(rows, [(0, 0)] * 3 + [(0, N1 - length), (0, 0)])
    b = t * np.einsum("spk,sbdkm->sbdpm", m, rows)
    spectra = np.einsum("sbdpm,smc->sbdpc", b, n)
    c = np.stack([k.conj() * spectra[1], k * spectra[0]])
    a = t.conj() * np.einsum("sbdpc,smc->sbdpm", c, n.conj())
    want = (
        np.einsum("pk,bdpm->bdkm", m[0].conj(), a[0]).real[:, :, :length],
        np.einsum("sbdpm,sbdkm->spk", a, rows),
        np.einsum("sbdpm,sbdpc->smc", b.conj(), c),
        (spectra[0].conj() * spectra[1]).sum(0),
    )
    got = np.asarray(du, np.float64), *(complex_of(part.sum(0)) for part in parts)
    return [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(got, want, strict=True)]


@pytest.mark.parametrize(
    ("batch", "features", "length", "blocks", "dtype"),
    [
        (2, 1, 56, 1, "bfloat16"),
        # two blocks for three features, rows of all lengths of a ring
        pytest.param(5, 3, 64, 2, "float16", marks=pytest.mark.slow),
        # more blocks than features: they share a batch that does not divide
        pytest.param(3, 1, 64, 2, "float16", marks=pytest.mark.slow),
    ],
)
def test_every_cotangent(batch, features, length, blocks, dtype):
    found = errors(batch, features, length, blocks, dtype)
    assert max(found) < FUSED[dtype], found  # 3.7e-3 in bfloat16, 4.6e-4 in float16


def _unconjugated(dtype, sign, a, b, c, d, right=learned_paired_sm90._weighed):
    return right(dtype, -sign, a, b, c, d)


def _unordered(zero, a, b, c, d, re, im, right=learned_paired_sm90._correlated):
    return right(zero, c, d, a, b, re, im)


PLANTED = {  # name -> what replaces it, the cotangents that it spoils
    "_weighed": (_unconjugated, (0, 1, 2)),
    "_correlated": (_unordered, (3,)),
    "_by": (learned_paired_sm90._by_conjugate, (0, 1, 2, 3)),
    "_by_conjugate": (learned_paired_sm90._by, (0, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_an_error_in_any_step_shows(name, monkeypatch):
    wrong, spoiled = PLANTED[name]
    monkeypatch.setattr(learned_paired_sm90, name, wrong)
    found = errors(1, 1, 64, 1, "float16")
    assert [at for at, error in enumerate(found) if error > 2 * FUSED["float16"]] == list(spoiled), found
