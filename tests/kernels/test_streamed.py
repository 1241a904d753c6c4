"""Sequences of five to eight blocks of 4096 steps, both ways, interpreted against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv import api, block_toeplitz, blocked, spectrum_sm90, streamed_gradient_sm90, streamed_sm90
from pallas_kernels.fft_conv.config import BLOCK, N1, TILE, Config
from pallas_kernels.fft_conv.rearranged import fragments, from_fragments
from pallas_kernels.fft_conv.tables import dft_tables, tap_cotangent, tap_spectra
from tests import tolerances
from tests.kernels.interpreter import interpreted
from tests.kernels.parity_table import relative_error

TOLERANCE = tolerances.FUSED["float16"]  # measured here: at most 6.2e-4
SHIFT = jnp.array([31], jnp.int32)
CONFIG = Config(TILE)
TABLES = (*dft_tables(CONFIG, jnp.float32), SHIFT)


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def flat(x) -> np.ndarray:
    """Sequences in rows of 64, in float64."""
    return np.asarray(x, np.float64).reshape(*x.shape[:-2], -1)


def products(shapes: block_toeplitz.Shapes, function, *sequences) -> np.ndarray:
    """The inverse transform of a function of sequences' transforms, of twice as many points, in float64."""
    n = 2 * shapes.length * TILE
    return np.fft.irfft(function(*(np.fft.rfft(x, n) for x in sequences)), n)[..., : n // 2]


def taps_of(shapes: block_toeplitz.Shapes, seed: int):
    """Taps `(C, D, L)` in float64 and by blocks `(D C, count, 4096)`, and their spectra in fragments."""
    blocks = random(seed, shapes.features * shapes.channels, shapes.count * BLOCK).astype(np.float32)
    blocks[:, shapes.length * TILE :] = 0
    taps = blocks[:, : shapes.length * TILE].reshape(shapes.features, shapes.channels, -1).swapaxes(0, 1)
    blocks = jnp.asarray(blocks.reshape(-1, shapes.count, BLOCK))
    spectra = tap_spectra(blocks, CONFIG, before=False).astype(jnp.float16)
    return (
        taps.astype(np.float64),
        blocks,
        fragments(*jnp.moveaxis(spectra.reshape(*shapes.spectra, 2, N1, TILE), -3, 0)),
    )


def five_blocks(batch: int, count: int = 5, channels: int = 1, **more) -> block_toeplitz.Shapes:
    """That many blocks, the last of which is short; one block of the grid has all rows, or so many share them."""
    length = N1 * count - 56
    return block_toeplitz.Shapes(batch, channels, 1, length, (0, count - 1), jnp.float16, **{"blocks": 1} | more)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "gated"), [(8, False), (6, True)])
def test_the_way_there(count, gated):
    shapes = five_blocks(2, count, pre_gates=int(gated), post_gates=int(gated), blocks=1 + gated)
    u, pre_gate, post_gate = (random(seed, 2, 1, 1, shapes.length, TILE) for seed in range(3))
    taps, _, spectra = taps_of(shapes, 3)
    with interpreted():
        kernel = jax.jit(streamed_sm90.forward(shapes))
        y = kernel(u, pre_gate, post_gate, spectra, *streamed_sm90.tables(jnp.float16, *TABLES))
    x = flat(u) * (flat(pre_gate) if gated else 1)
    want = products(shapes, lambda x, k: x * k, x, taps) * (flat(post_gate) if gated else 1)
    assert relative_error(flat(y), want) < TOLERANCE  # 6.2e-4


def errors_both_ways(shapes: block_toeplitz.Shapes, monkeypatch) -> dict[str, float]:
    """Of the result, and of the cotangents of u and of the taps."""
    monkeypatch.setattr(blocked, "_shapes", lambda *_: shapes)
    u, g = (random(seed, shapes.batch, n, 1, shapes.length, TILE) for seed, n in enumerate((1, shapes.channels)))
    taps, blocks, spectra = taps_of(shapes, 2)

    @jax.jit
    def both(u, g, spectra, *tables):
        y = blocked.forward(u, None, None, spectra, shapes.lags, *tables)
        d_u, _, d_spectra = blocked.backward(u, None, None, g, spectra, shapes.lags, *tables)
        d_spectra = d_spectra.sum(0).reshape(-1, shapes.count, 2, N1, TILE)
        return y, d_u, tap_cotangent(d_spectra, blocks, CONFIG, before=False)

    with interpreted():
        y, d_u, d_taps = both(u, g, spectra, *TABLES)
    d_taps = flat(d_taps).reshape(1, shapes.channels, -1)[..., : shapes.length * TILE].swapaxes(0, 1)
    return {
        "y": relative_error(flat(y), products(shapes, lambda u, k: u * k, flat(u), taps)),
        "u": relative_error(flat(d_u), products(shapes, lambda k, g: k.conj() * g, taps, flat(g))),
        "taps": relative_error(d_taps, products(shapes, lambda u, g: (u.conj() * g).sum(0), flat(u), flat(g))),
    }


def test_both_ways(monkeypatch):
    errors = errors_both_ways(five_blocks(2), monkeypatch)
    assert max(errors.values()) < TOLERANCE, errors  # 5.8e-4


@pytest.mark.slow
@pytest.mark.parametrize(("count", "batch", "channels"), [(8, 2, 1), (6, 3, 2)])
def test_both_ways_of_other_shapes(count, batch, channels, monkeypatch):
    errors = errors_both_ways(five_blocks(batch, count, channels, blocks=2), monkeypatch)
    assert max(errors.values()) < TOLERANCE, errors  # 6.0e-4


@pytest.mark.parametrize("blocks", [3, 24])
def test_the_taps_gradient_of_a_batch_that_is_shared_out(blocks):
    """Of five rows, two channels that share u: all in one part, or three that have two, two and one."""
    shapes = five_blocks(5, channels=2, blocks=blocks)
    x, h = (random(seed, 5, n, 1, 2, 5, N1, TILE) for seed, n in enumerate((1, 2)))
    operands = (jnp.moveaxis(fragments(*jnp.moveaxis(z, 3, 0)), 3, 4) for z in (x, h))
    with interpreted():
        d_spectra = jax.jit(streamed_gradient_sm90.taps_gradient(shapes))(*operands)
    assert len(d_spectra) == (1 if blocks == 3 else 3)
    x, h = (z[:, :, :, 0] + 1j * z[:, :, :, 1].astype(np.float64) for z in (x, h))
    sums = (np.einsum("bcdspq,bcdspq->dcpq", x[..., : 5 - lag, :, :].conj(), h[..., lag:, :, :]) for lag in range(5))
    want = np.stack(list(sums), 2)
    for got, part in zip(from_fragments(d_spectra.sum(0)), (want.real, want.imag), strict=True):
        assert relative_error(got, part) < 1e-6  # 1.5e-7


def test_the_transform_of_the_taps_writes_fragments():
    taps = jnp.asarray(random(0, 3, 2, BLOCK).astype(np.float32))
    with interpreted():
        planes, whole = (
            spectrum_sm90.tap_spectra(taps, CONFIG, jnp.float16, *TABLES, before=False, in_fragments=in_fragments)
            for in_fragments in (False, True)
        )
    np.testing.assert_array_equal(whole, fragments(*jnp.moveaxis(planes, -3, 0)))


@pytest.mark.parametrize(
    ("blocks", "ahead", "gated", "want"),
    [
        (4, True, True, True),
        (8, False, False, True),
        (8, False, True, False),
        (5, True, False, False),
        (9, False, False, False),
    ],
)
def test_which_cotangents_take_three_passes(blocks, ahead, gated, want):
    u = jnp.zeros((1, 1, blocks * N1 - 8, TILE), jnp.bfloat16)
    taps = jnp.zeros((1, 1, blocks * (1 + ahead), 1))
    assert api._on_chip_back(u, taps, api._Gates(False, gated, both_ways=False)) is want
