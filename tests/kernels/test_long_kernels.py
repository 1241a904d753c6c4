"""The kernels of long sequences, each alone in the interpreter against float64, and together through `long_conv`.

Whole sequences take a minute or more interpreted, so those are in the slow lane; `test_lowering` has every length.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashbutterfly_jax import long_conv
from pallas_kernels.fft_conv import (
    api,
    block_toeplitz,
    column_dft,
    inner_chain,
    inner_rows,
    inner_sm90,
    outer_panels,
    outer_radix4_sm90,
    outer_radix_sm90,
    three_pass,
)
from pallas_kernels.fft_conv.config import BLOCK, N1, TILE, Config
from pallas_kernels.fft_conv.outer_plan import (
    OuterPlan,
    inner_tables,
    outer_plan,
    radix_roots,
    radix_tables,
    real_product_tables,
)
from pallas_kernels.fft_conv.rearranged import exchanged, in_thread_order, unpacked
from pallas_kernels.fft_conv.tables import block_scale
from tests import tolerances
from tests.kernels.interpreter import interpreted
from tests.kernels.parity_table import relative_error
from tests.parity import Case, cast

TOLERANCE = tolerances.FUSED["float16"]  # measured here: at most 6.6e-4
SHIFT = jnp.array([31], jnp.int32)
INNER_SCALE = block_scale(Config(TILE))


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def frequencies(plan: OuterPlan) -> np.ndarray:
    """k1 in the order in which rows are kept."""
    if plan.radix == 4:
        return np.arange(plan.rows)
    return (np.arange(plan.radix)[:, None] + plan.radix * np.arange(plan.height)).ravel()


def columns(plan: OuterPlan) -> np.ndarray:
    """k2 in the order in which the rows' kernels keep frequencies."""
    radix = column_dft.radix(plan.row_width)
    return (np.arange(radix)[:, None] + radix * np.arange(16)).ravel()


def split_matrix(plan: OuterPlan) -> np.ndarray:
    """exp(-2 pi i (k1 + 1/4) n1 / m), scaled."""
    return plan.scale * np.exp(-2j * np.pi * np.outer(frequencies(plan) + 0.25, np.arange(plan.rows)) / plan.rows)


def kept(spectra: np.ndarray, plan: OuterPlan) -> np.ndarray:
    """Complex spectra `(..., height, 64)` as the inner kernels take them."""
    if plan.paired:
        return np.asarray(in_thread_order(jnp.asarray(spectra.real), jnp.asarray(spectra.imag)))
    return np.stack([spectra.real, spectra.imag], -3)


def joined(d_spectra: np.ndarray, plan: OuterPlan) -> np.ndarray:
    """Complex cotangents `(..., height, 64)` of what the inner kernels sum up, `(..., planes, 64, 64)`."""
    if plan.paired:  # eight rows of real and of imaginary parts in turns
        planes = d_spectra.reshape(*d_spectra.shape[:-3], 4, 2, 8, TILE)
        re, im = (planes[..., part, :, :].reshape(*d_spectra.shape[:-3], 32, TILE) for part in (0, 1))
    else:
        re, im = d_spectra[..., 0, :, :], d_spectra[..., 1, :, :]
    return re + 1j * im


@pytest.mark.parametrize(
    ("plan", "blocks", "before"),
    [
        (OuterPlan(1, 4), 2, True),
        (OuterPlan(1, 8, BLOCK // 2, True), 2, True),
        pytest.param(OuterPlan(1, 8), 7, False, marks=pytest.mark.slow),
        pytest.param(OuterPlan(1, 12), 9, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_spectra_of_the_taps_and_their_cotangent(plan, blocks, before):
    """Of two features, the second so small that float16 holds none of its taps."""
    taps = random(0, 2, 1, blocks * (1 + before), BLOCK).astype(np.float32)
    taps[1] *= 1e-20
    d_spectra = random(1, 2, 1, plan.rows, 1 if plan.paired else 2, N1, TILE).astype(np.float32)

    def both(taps, d_spectra):
        spectra = three_pass.tap_spectra(taps, plan, jnp.bfloat16, SHIFT, before=before)
        return spectra, three_pass.tap_cotangent(d_spectra, taps.shape[2], plan, SHIFT, before=before)

    with interpreted():
        spectra, d_taps = jax.jit(both)(taps, d_spectra)

    n, ahead = plan.points, blocks * BLOCK if before else 0
    turn = np.exp(-0.5j * np.pi * np.arange(n) / n)
    scale = 1 / (n * (plan.scale * INNER_SCALE) ** 2)
    flat = taps.reshape(2, -1).astype(np.float64)
    after = flat.shape[1] - ahead
    x = np.pad(flat[:, ahead:], ((0, 0), (0, n - after))) + 1j * np.pad(flat[:, :ahead], ((0, 0), (n - ahead, 0)))
    want = scale * np.fft.fft(x * turn).reshape(2, TILE, -1, plan.rows)[..., frequencies(plan)].transpose(0, 3, 2, 1)
    want = want[..., columns(plan)]
    # Alone the rounding to bfloat16 makes 1.7e-3.
    for got, one in zip(np.asarray(spectra, np.float64)[:, 0], want, strict=True):
        assert relative_error(got, kept(one, plan)) < 2e-3  # 1.71e-3; of rows of 2048 steps, in float32, 4e-4

    in_order = np.zeros((2, TILE, plan.row_height, plan.rows), complex)
    in_plan = joined(d_spectra[:, 0], plan)[..., np.argsort(columns(plan))]
    in_order[..., frequencies(plan)] = in_plan.transpose(0, 3, 2, 1)
    d_x = scale * n * np.fft.ifft(in_order.reshape(2, -1)) / turn
    want = np.concatenate([d_x[:, n - ahead :].imag, d_x[:, :after].real], 1)
    assert relative_error(np.asarray(d_taps).reshape(2, -1), want) < TOLERANCE  # 4.6e-4


def test_plans_hold_their_sequences_and_no_more():
    for rows in (1, 5, 128, 129, 193, 256, 257, 1024):
        plan = outer_plan(rows)
        assert rows <= plan.rows < max(1.5 * rows, rows + 4)
        assert plan.radix == 1 or (plan.height % 16 == 0 and plan.height <= N1)
    with pytest.raises(NotImplementedError, match="at most 4194304 steps; got 1025 rows"):
        outer_plan(1025)


def test_both_ways_have_one_plan(monkeypatch):
    """So that they can share a split; without a way back, rows of 4096 steps are paired."""
    plans = []
    monkeypatch.setattr(api, "outer_plan", lambda *asked, **more: plans.append(outer_plan(*asked, **more)) or plans[-1])
    u, taps = jax.ShapeDtypeStruct((2, 1, 600_000), jnp.bfloat16), jax.ShapeDtypeStruct((1, 600_000), jnp.float32)
    convolve = functools.partial(long_conv, implementation="mosaic_gpu")
    jax.eval_shape(lambda u, taps: jax.vjp(convolve, u, taps)[1](u), u, taps)
    assert set(plans) == {OuterPlan(4, 48)}
    plans.clear()
    jax.eval_shape(convolve, u, taps)
    assert set(plans) == {OuterPlan(4, 48, paired=True)}


@pytest.mark.parametrize(
    ("plan", "batch"),
    [(OuterPlan(1, 2), 3), (OuterPlan(1, 2, BLOCK // 2, True), 5), (OuterPlan(1, 2, paired=True), 3)],
    ids=str,
)
def test_inner_kernels(plan, batch):
    """Two blocks for two rows of two features, three tiles for two warpgroups: every ring wraps.

    Wide rows have no kernel for the way back.
    """
    dtype, features, m, height = jnp.float16, 2, plan.rows, plan.row_height
    width = plan.row_width
    tile = {"height": height, "width": width, "together": N1 // height}
    shapes = inner_rows.Shapes(batch, 1, features, m, dtype, **tile, warpgroups=2, blocks=2)
    x, h = (random(seed, *shapes.result.shape) for seed in (0, 1))
    taps = random(2, features, 1, m, height, width) + 1j * random(3, features, 1, m, height, width)
    f1, f2, twiddle = inner_tables(plan, dtype)

    def both(x, h, taps):
        operands = taps, f1, f2, twiddle, SHIFT
        y = inner_sm90.forward(shapes)(x, *operands)
        return (y, None, None) if width > TILE else (y, *inner_sm90.backward(shapes)(x, h, *operands))

    with interpreted():
        y, dx, d_taps = jax.jit(both)(x, h, kept(taps, plan).astype(np.float32 if plan.paired else np.float16))

    turn = np.exp(-2j * np.pi * (frequencies(plan)[:, None] + 0.25) / m * np.arange(plan.steps) / plan.steps)

    def rows(z):
        z = np.asarray(z, np.float64).reshape(batch, features, *((m, 2) if plan.paired else (2, m)), plan.steps)
        re, im = np.moveaxis(z, 3 if plan.paired else 2, 0)
        return re + 1j * im

    def transform(z):
        return np.fft.fft(z * turn).reshape(*z.shape[:-1], width, height).swapaxes(-1, -2)[..., columns(plan)]

    def back(z):
        z = z[..., np.argsort(columns(plan))]
        return np.fft.ifft(z.swapaxes(-1, -2).reshape(*z.shape[:-2], plan.steps)) * np.conj(turn) * plan.steps

    def check(got, want):
        assert relative_error(np.stack([got.real, got.imag]), np.stack([want.real, want.imag])) < TOLERANCE  # 5.6e-4

    taps = taps[:, 0]
    spectrum_of_x, spectrum_of_h = transform(rows(x)), transform(rows(h))
    check(rows(y), back(spectrum_of_x * taps) * INNER_SCALE**2)
    if dx is None:
        return
    check(rows(dx), back(spectrum_of_h * taps.conj()) * INNER_SCALE**2)
    d_taps = np.asarray(d_taps, np.float64).sum(0)[:, 0]
    check(joined(d_taps, plan), (spectrum_of_x.conj() * spectrum_of_h).sum(0) * INNER_SCALE**2)


def test_wide_rows_have_no_way_back():
    shapes = inner_rows.Shapes(2, 1, 1, 4, jnp.float16, height=32, width=128, together=2)
    with pytest.raises(NotImplementedError, match="rows of 128 columns"):
        inner_sm90.backward(shapes)


@pytest.mark.parametrize(
    ("name", "wrong"),
    {
        "exchanged": lambda first, second: exchanged(second, first),
        "unpacked": lambda ref: unpacked(ref)[::-1],
    }.items(),
)
def test_errors_in_pairs_of_rows_show(name, wrong, monkeypatch):
    monkeypatch.setattr(inner_chain, name, wrong)
    with pytest.raises(AssertionError, match="relative_error"):
        test_inner_kernels(OuterPlan(1, 1, paired=True), 2)


@pytest.mark.parametrize("gated", [False, True])
def test_split_and_join_by_one_product(gated):
    """Twelve rows, of which the sequence has ten, in tiles of 64; two channels with a gate each, or none."""
    plan, rows, channels = OuterPlan(1, 12), 16, 2 if gated else 1
    u, gate = random(0, 1, 1, 1, rows, BLOCK), random(1, 1, channels, 1, rows, BLOCK)
    u[..., 10:, :] = 0
    w = random(2, 1, channels, 1, 2 * plan.rows, BLOCK)

    def both(u, gate, w):
        gate = gate if gated else None
        return three_pass._split(u, gate, plan), three_pass._join(w, gate, plan, rows)

    with interpreted():
        z, y = jax.jit(both)(u, gate, w)
    matrix, gates = split_matrix(plan), gate[..., : plan.rows, :].astype(np.float64) if gated else 1.0
    want = matrix @ (u[..., : plan.rows, :].astype(np.float64) * gates)
    assert relative_error(z, np.concatenate([want.real, want.imag], -2)) < TOLERANCE  # 3.1e-4
    re, im = np.split(w.astype(np.float64), 2, -2)
    want = (matrix.conj().T @ (re + 1j * im)).real * gates
    assert relative_error(y[..., : plan.rows, :], want) < TOLERANCE  # 2.9e-4


def stages_by_two_factors(plan: OuterPlan, rows: int, blocks: int):
    """(u, tables) -> Z and (w, tables) -> y of one sequence `(1, rows, 4096)`, and the tables."""
    shapes = outer_panels.Shapes(1, rows, plan, jnp.float16, blocks)
    if plan.radix > 4:
        f, factors = radix_tables(plan)
        split, join = outer_radix_sm90.split(shapes), outer_radix_sm90.join(shapes)
        tables = f.astype(jnp.float16), factors, radix_roots(plan)
        return (
            lambda u, tables: split(u, *tables),
            lambda w, tables: join(w, *tables),
            tables,
        )
    f, factors = real_product_tables(plan)
    split, join = outer_radix4_sm90.split(shapes), outer_radix4_sm90.join(shapes)
    return (
        lambda u, tables: split(u.reshape(1, rows // 4, 4 * BLOCK), *tables),
        lambda w, tables: join(w, *tables).reshape(1, rows, BLOCK),
        (f.astype(jnp.float16), factors),
    )


def error_of_split(z, u, plan: OuterPlan) -> float:
    """Of Z, or some of its columns, for those of u."""
    want = split_matrix(plan)[:, : u.shape[-2]] @ u.astype(np.float64)
    return relative_error(z, np.concatenate([want.real, want.imag], -2))


def error_of_join(y, w, plan: OuterPlan) -> float:
    """Of y, or some of its columns, for those of w."""
    re, im = np.split(w.astype(np.float64), 2, -2)
    return relative_error(y, (split_matrix(plan)[:, : y.shape[-2]].conj().T @ (re + 1j * im)).real)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five minutes of two radices that the interpreter unrolls
@pytest.mark.parametrize("plan", [OuterPlan(4, 48), OuterPlan(8, 16), OuterPlan(16, 16)], ids=str)
def test_split_and_join_by_two_factors(plan):
    rows = plan.rows - 32
    split, join, tables = stages_by_two_factors(plan, rows, blocks=3)
    u, w = random(0, 1, rows, BLOCK), random(1, 1, 2 * plan.rows, BLOCK)
    with interpreted():
        z = jax.jit(split)(u, tables)
        y = jax.jit(join)(w, tables)
    assert error_of_split(z, u, plan) < TOLERANCE
    assert error_of_join(y, w, plan) < TOLERANCE


@pytest.mark.parametrize("plan", [OuterPlan(8, 16), OuterPlan(16, 16)], ids=str)
def test_one_panel_of_a_split_and_a_join_by_two_factors(plan, monkeypatch):
    monkeypatch.setattr(outer_panels.Panels, "steps", 1)
    split, join, tables = stages_by_two_factors(plan, plan.rows, blocks=1)
    u, w = random(0, 1, plan.rows, BLOCK), random(1, 1, 2 * plan.rows, BLOCK)
    with interpreted():
        z = jax.jit(split)(u, tables)
        y = jax.jit(join)(w, tables)
    first = slice(32)
    assert error_of_split(z[..., first], u[..., first], plan) < TOLERANCE  # 3.1e-4
    assert error_of_join(y[..., first], w[..., first], plan) < TOLERANCE  # 3.8e-4


@pytest.mark.parametrize("plan", [OuterPlan(4, 16, paired=True), OuterPlan(8, 16, paired=True)], ids=str)
def test_parts_of_paired_rows_lie_side_by_side(plan, monkeypatch):
    """The first panel of both stages by two factors, as the three passes call them."""
    for name in ("grid", "steps"):
        monkeypatch.setattr(outer_panels.Panels, name, 1)
    u, w = random(0, 1, 1, 1, plan.rows, BLOCK), random(1, 1, 1, 1, 2 * plan.rows, BLOCK)
    with interpreted():
        z = jax.jit(lambda u: three_pass._split(u, None, plan))(u)
        y = jax.jit(lambda w: three_pass._join(w, None, plan, plan.rows))(w)
    first = slice(outer_panels.Shapes(1, plan.rows, plan, jnp.float16).columns)

    def apart(z):
        """The parts one above the other, as others keep them."""
        return np.asarray(z).reshape(1, plan.rows, 2, BLOCK)[..., first].swapaxes(1, 2).reshape(1, 2 * plan.rows, -1)

    assert error_of_split(apart(z), u[0, 0, :, :, first], plan) < TOLERANCE  # 3.1e-4
    assert error_of_join(y[0, 0, :, :, first], apart(w), plan) < TOLERANCE  # 3.9e-4


TABLE_ERRORS = {
    "none": lambda f, factors: (f, factors),
    "scale": lambda f, factors: (f * f.dtype.type(1.01), factors),
    "sign of f": lambda f, factors: (f, factors * np.array([1, -1], np.float32)[:, None]),
}


@pytest.mark.parametrize("way", ["split", "join"])
def test_panels_of_a_stage_of_real_products_and_what_errors_in_a_table_make_of_them(way, monkeypatch):
    """Three panels, so that the two places of each come around, of a sequence that has fewer rows than the plan."""
    plan, rows, first = OuterPlan(4, 48), 160, slice(3 * 64)
    monkeypatch.setattr(outer_panels.Panels, "steps", 3)
    split, join, tables = stages_by_two_factors(plan, rows, blocks=1)
    stage, error = (split, error_of_split) if way == "split" else (join, error_of_join)
    x = random(0, 1, rows if way == "split" else 2 * plan.rows, BLOCK)
    with interpreted():
        stage = jax.jit(stage)
        results = {name: stage(x, planted(*tables)) for name, planted in TABLE_ERRORS.items()}
    errors = {name: error(result[..., first], x[..., first], plan) for name, result in results.items()}
    assert errors.pop("none") < TOLERANCE  # 3.4e-4
    assert min(errors.values()) > 2 * TOLERANCE, errors  # that of the scale is 1e-2


@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("features", [1, 5, 192, 256, 768, 1000])
def test_blocks_share_rows_evenly(features, batch):
    schedule = block_toeplitz.Schedule(block_toeplitz.Shapes(batch, 1, features, 8 * N1, (0, 7), jnp.bfloat16), least=1)
    assert schedule.items * schedule.rows >= features * batch
    fair = math.ceil(features * batch / 132)
    assert fair <= schedule.steps <= fair * 1.05 + 1  # 1.03 times as many for 768 features with whole batches


CASES = {
    # five blocks of a causal sequence, without three passes either way
    "causal": (Case(20000, 20000, batch=(2,), features=1), "bfloat16", None),
    "nine blocks": (Case(32769, 300, batch=(1,), features=1), "float16", None),
    "all at once": (
        Case(17000, 40, True, True, channels=2, skip=True, pre_gate=True, post_gate="own", batch=(1,), features=1),
        "float16",
        None,
    ),
    "bidirectional, gated": (
        Case(16385, 16385, True, pre_gate=True, post_gate="shared", batch=(2,), features=1),
        "bfloat16",
        None,
    ),
    # as if it were longer than one product splits
    "two factors": (
        Case(33000, 9, True, pre_gate=True, post_gate="shared", batch=(1,), features=1),
        "float16",
        OuterPlan(4, 16),
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, monkeypatch):
    case, dtype, plan = CASES[name]
    if plan is not None:
        monkeypatch.setattr(api, "outer_plan", lambda rows, batch, both_ways: plan)
    arrays = cast(case.arguments(), dtype)
    convolve = functools.partial(long_conv, circular=case.circular)
    y = jax.eval_shape(lambda arrays: convolve(**arrays), arrays)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), dtype)

    def both(implementation, arrays, cotangent):
        y, pull_back = jax.vjp(lambda arrays: convolve(**arrays, implementation=implementation), arrays)
        return y, pull_back(cotangent)[0]

    with interpreted():
        got = jax.jit(functools.partial(both, "mosaic_gpu"))(arrays, cotangent)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), (arrays, cotangent))
        want = jax.jit(functools.partial(both, "xla"))(*exact)
        want = jax.tree.map(np.asarray, want)
    tolerance = tolerances.FUSED["float16" if dtype == "float16" else "bfloat16"]  # measured: 7.4e-4, 5.7e-3
    errors = jax.tree.map(relative_error, got, want)
    assert max(jax.tree.leaves(errors)) < tolerance, errors
