"""The backward kernel of learned rows: every cotangent against float64, interpreted, and planted errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv import learned_rows_backward_sm90 as kernels
from pallas_kernels.fft_conv.config import N1, SHARED_MEMORY_BYTES, TILE
from pallas_kernels.fft_conv.learned_rows import Shapes
from tests.kernels import resources
from tests.kernels.interpreter import interpreted
from tests.kernels.programs import LEARNED_ROWS
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
        # three features for two blocks of each row, each with three items of two sequences: all places of rows
        pytest.param(4, 3, 2, 5, "float16", marks=pytest.mark.slow),
        # of three items, the second block of each row lacks one
        pytest.param(1, 3, 3, 6, "bfloat16", marks=pytest.mark.slow),
        # five sequences by two blocks: the second has a step without work
        pytest.param(5, 1, 1, 2, "float16", marks=pytest.mark.slow),
    ],
)
def test_every_cotangent(batch, features, rows, blocks, dtype):
    found = errors(batch, features, rows, blocks, dtype)
    assert max(found) < FUSED[dtype], found  # 3.8e-3 in bfloat16, 4.7e-4 in float16


def _unconjugated(dtype, sign, a, b, c, d, right=kernels._weighed):
    return right(dtype, -sign, a, b, c, d)


def _unsigned(zero, sign, a, b, c, d, total, right=kernels._add_weighed):
    return right(zero, sign * sign, a, b, c, d, total)


PLANTED = {  # name -> what replaces it, the cotangents that it spoils
    "_weighed": (_unconjugated, (0, 1, 2, 3)),
    "_add_weighed": (_unsigned, (4,)),
    "_by": (kernels._by_conjugate, (0, 1, 2, 3, 4)),
    "_by_conjugate": (kernels._by, (0, 1, 2)),
    "_negative": (lambda total: total, (0, 1, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_an_error_in_any_step_shows(name, monkeypatch):
    wrong, spoiled = PLANTED[name]
    monkeypatch.setattr(kernels, name, wrong)
    found = errors(2, 1, 1, 1, "float16")
    assert [at for at, error in enumerate(found) if error > 2 * FUSED["float16"]] == list(spoiled), found


@pytest.mark.slow
def test_a_place_too_few_is_a_race(monkeypatch):
    """The next row would come to where this one's result leaves from."""
    monkeypatch.setattr(kernels, "_HELD", kernels._SPECTRA)
    with pytest.raises(AssertionError):
        errors(2, 1, 1, 1, "float16")


@pytest.mark.parametrize("program", [p for p in LEARNED_ROWS if p.function == "learned_rows_backward"], ids=str)
def test_shared_memory_is_what_the_compiler_found(program):
    assert resources.table()[str(program)]["shared"] == kernels.SHARED_MEMORY
    assert kernels.SHARED_MEMORY + 1024 <= SHARED_MEMORY_BYTES
