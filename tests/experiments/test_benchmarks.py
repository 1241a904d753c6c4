"""The benchmark of the convolution: its arithmetic by hand, its reference, and what it writes and refuses."""

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments.benchmarks import convolution, floors, rivals, table
from experiments.benchmarks.cases import Case, random_inputs, reference, relative_errors
from experiments.benchmarks.implementations import prepare
from experiments.benchmarks.record import Record, Row, speedups
from pallas_kernels.timing import Effort, seconds_per_call

H200 = floors.LIMITS["NVIDIA H200"]
BIG = Case("causal", 4096, "bfloat16", "forward", gated=False, batch=64, features=768)
SMALL = Case("causal", 12, "float32", "forward+backward", gated=True, batch=2, features=5)


def row(name: str, ms: float | None, **changes) -> Row:
    fields = {"protocol": "causal", "length": 1024, "dtype": "bfloat16", "direction": "forward", "gated": False}
    return Row(name, **{"status": "measured", "batch": 64, "features": 768, "ms": ms} | fields | changes)


def record(*rows: Row, date: str = "2026-11-23") -> Record:
    return Record("NVIDIA H200", "gpu", date, {"jax": "0.11.2"}, {}, list(rows))


def test_bytes_and_flop_by_hand():
    sequence, taps = 64 * 768 * 4096 * 2, 768 * 4096 * 4
    assert floors.compulsory_bytes(BIG) == 2 * sequence + taps
    assert floors.compulsory_bytes(dataclasses.replace(BIG, gated=True)) == 4 * sequence + taps
    both = dataclasses.replace(BIG, direction="forward+backward")
    assert floors.compulsory_bytes(both) == 5 * sequence + 3 * taps
    assert floors.compulsory_bytes(dataclasses.replace(both, gated=True)) == 11 * sequence + 3 * taps
    # Per point: 64 real-by-complex products each way, 4 FLOP each, and twice 64 complex ones, 8 FLOP each.
    assert floors.row_flop((64, 64)) == 4096 * (2 * 64 * 4 + 2 * 64 * 8)
    assert floors.plan_flop(both, (64, 64), circular=False) == 2.5 * 49152 * floors.row_flop((64, 64))
    assert floors.fft_flop(BIG) == 49152 * 2 * 2.5 * 8192 * 13


def test_floors_of_an_h200():
    assert floors.memory_floor_ms(BIG, H200) == pytest.approx(0.190, abs=1e-3)
    assert floors.tensor_floor_ms(BIG, H200) == pytest.approx(0.163, abs=1e-3)
    assert 1e3 * floors.plan_flop(BIG, (64, 64), circular=False) / H200.flop_per_second == pytest.approx(
        0.391, abs=1e-3
    )


@pytest.mark.parametrize("length", [1, 256, 257, 1000, 4096, 32768, 1 << 20])
@pytest.mark.parametrize("circular", [False, True])
def test_plans_hold_the_sequence(length, circular):
    factors = floors.cheapest_plan(length, circular=circular)
    assert max(256, length) <= math.prod(factors) < max(257, 2 * length)
    assert factors == tuple(sorted(factors, reverse=True))


def test_no_plan_is_too_long():
    with pytest.raises(ValueError, match="length must be at most 4294967296; got 4294967297"):
        floors.cheapest_plan(256**4 + 1)


@pytest.mark.parametrize("length", [1, 1024, 1025, 4096, 4097, 8193, 16384, 16385, 32768, 32769])
@pytest.mark.parametrize("ahead", [False, True])
def test_plan_of_the_fused_kernel_is_the_kernels_own(length, ahead):
    from pallas_kernels.fft_conv import streamed_sm90
    from pallas_kernels.fft_conv.config import BLOCK, MAX_BLOCKS, N1, second_factor

    plan = floors.fused_plan(length, ahead=ahead)
    if length > BLOCK * (MAX_BLOCKS if ahead else streamed_sm90.MAX_BLOCKS):
        assert plan is None
    else:
        factors = N1, second_factor(length)
        assert plan == (factors, math.ceil(length / math.prod(factors)))


def test_plans_of_the_triton_kernels_are_their_own():
    from pallas_kernels.fft_conv.triton_plans import CARDS

    for card in ("8.0", "9.0"):
        assert tuple((plan.n1, plan.n2) for plan in CARDS[card].plans) == floors.TRITON_FACTORS
    assert floors.triton_plan(1025) == ((64, 32), 1)
    assert floors.triton_plan(CARDS["9.0"].longest + 1) is None


@pytest.mark.parametrize("protocol", ["causal", "circular"])
def test_reference_is_the_direct_sum_and_its_derivative(protocol):
    case = dataclasses.replace(SMALL, protocol=protocol)
    inputs = random_inputs(case, seed=3)
    results = reference(case, inputs)
    f, length = case.sampled_features, case.length
    u, k, pre, post, g = (np.asarray(inputs[name])[..., f, :].astype(np.float64) for name in case.inputs)
    lag = np.subtract.outer(np.arange(length), np.arange(length))
    matrix = k[:, lag % length] * (1.0 if protocol == "circular" else lag >= 0)

    def y(u, pre, post):
        return post * np.einsum("dts,bds->bdt", matrix, pre * u)

    np.testing.assert_allclose(results["y"], y(u, pre, post), atol=1e-13)
    rng = np.random.default_rng(0)
    for name, value, changed in (
        ("u", u, lambda x: y(x, pre, post)),
        ("pre_gate", pre, lambda x: y(u, x, post)),
        ("post_gate", post, lambda x: y(u, pre, x)),
    ):  # y is linear in each
        v = rng.standard_normal(value.shape)
        assert np.vdot(results[name], v) == pytest.approx(np.vdot(g, changed(v)), rel=1e-10)
    assert np.vdot(results["kernel"], k) == pytest.approx(np.vdot(g, results["y"]), rel=1e-10)


@pytest.mark.parametrize("name", ["jnp_fft", "xla", "butterfly"])
@pytest.mark.parametrize("protocol", ["causal", "circular"])
def test_implementations_agree_with_the_reference(name, protocol):
    case = dataclasses.replace(SMALL, protocol=protocol)
    inputs = random_inputs(case, seed=0)
    errors = relative_errors(prepare(name, case, [inputs]).results(), reference(case, inputs))
    assert set(errors) == {"y", "u", "kernel", "pre_gate", "post_gate"}
    assert max(errors.values()) < 1e-6  # measured 2.2e-7


def test_a_wrong_result_is_marked_and_not_compared_with():
    case = dataclasses.replace(SMALL, direction="forward")
    bench = convolution.Bench(case, Effort(1, 1e-4, 0.0), case.batch * case.features, gpu=False)
    bench.expected = {"y": bench.expected["y"] * 2}
    wrong = bench.row("jnp_fft")
    assert (wrong.status, wrong.reason) == ("wrong", "relative error 0.5")
    assert speedups(row("xla", 1.0), [row("jnp_fft", 1.0, status="wrong")]) == (None, None, None)


def test_reports_why_a_row_was_not_measured(monkeypatch):
    bench = convolution.Bench(SMALL, Effort(1, 1e-4, 0.0), SMALL.batch * SMALL.features, gpu=False)
    assert bench.row("mosaic_gpu").reason == bench.row("triton").reason == "needs a CUDA device"
    monkeypatch.setattr(rivals, "missing", lambda name: "torch")
    assert (bench.row("torch_real").status, bench.row("torch_real").reason) == ("not installed", "no module 'torch'")

    def refuse(*args):
        raise NotImplementedError("too long\nsecond line")

    def break_down(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(convolution.implementations, "prepare", refuse)
    assert (bench.row("xla").status, bench.row("xla").reason) == ("unsupported", "too long")
    monkeypatch.setattr(convolution.implementations, "prepare", break_down)
    assert (bench.row("xla").status, bench.row("xla").reason) == ("failed", "RuntimeError: out of memory")


def test_time_is_the_calls_and_rounds_end():
    calls = []

    def run(n: int) -> float:
        calls.append(n)
        return 0.002 * n

    seconds = seconds_per_call(run, Effort(repeats=7, round_seconds=0.01, limit_seconds=9.0))
    np.testing.assert_allclose(seconds, np.full(7, 0.002))
    assert calls == [1, 2] + 7 * [5]
    assert len(seconds_per_call(run, Effort(repeats=7, round_seconds=0.01, limit_seconds=0.0))) == 3


def test_speedups():
    rows = [row("mosaic_gpu", 0.5), row("jnp_fft", 2.0), row("torch_real", 1.0), row("xla", 0.1)]
    rows.append(row("flashfftconv", 0.2, length=2048))
    assert speedups(rows[0], rows) == (4.0, 2.0, "torch_real")


def test_large_batches_are_cut_and_scaled(monkeypatch):
    settings = convolution.parse(["--batch", "64", "--features", "768"], gpu=True)
    assert [convolution.batch_that_fits(settings, n) for n in (8192, 16384, 65536)] == [64, 32, 8]
    case = dataclasses.replace(SMALL, direction="forward", gated=False)
    monkeypatch.setattr(convolution, "seconds_per_call", lambda *_: np.array([0.001, 0.002, 0.003]))
    rows = 4 * case.batch * case.features
    scaled = convolution.Bench(case, Effort(1, 1e-4, 0.0), rows, gpu=False).row("jnp_fft")
    assert (scaled.batch, scaled.scaled_rows) == (case.batch, 4 * case.batch * case.features)
    assert scaled.ms == pytest.approx(8.0)
    assert scaled.bytes_per_second == pytest.approx(floors.compulsory_bytes(case) / 0.002)


def test_a_quick_run_prints_and_writes(tmp_path, capsys):
    arguments = ["--quick", "--lengths", "16", "--directions", "forward", "--batch", "2", "--features", "3"]
    convolution.main([*arguments, "--implementations", "mosaic_gpu", "jnp_fft", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "says nothing about a GPU" in printed
    assert "mosaic_gpu: not measured at L = 16 (needs a CUDA device)" in printed
    (written,) = tmp_path.glob("*.json")
    assert written.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 2
    absent, timed = Record.read(written).rows
    assert (absent.status, timed.status, timed.memory_floor_ms) == ("not measured", "measured", None)
    assert 0 < timed.error < 7e-3  # measured 1.6e-3


def test_rows_after_the_time_is_over_are_reported(tmp_path, capsys):
    convolution.main(["--seconds", "0", "--lengths", "16", "--implementations", "xla", "--out", str(tmp_path)])
    assert "the 0 s for the whole run were over" in capsys.readouterr().out


def test_a_record_survives_being_written(tmp_path):
    before = record(row("mosaic_gpu", 0.2, factors=(64, 16), errors={"y": 5e-3}, ms_quartiles=(0.19, 0.21)))
    before.write(tmp_path / "a.json")
    assert Record.read(tmp_path / "a.json") == before


def test_files_that_are_no_records(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"{table.BEGIN} old {table.END}")
    whole = dataclasses.asdict(record(row("xla", 1.0)))
    wrong = {
        "missing.json": (None, "cannot be read (No such file or directory)."),
        "words.json": ("words", "JSONDecodeError"),
        "bytes.json": (b"\xff\xfe", "UnicodeDecodeError"),
        "list.json": ("[1, 2]", "TypeError"),
        "number.json": ('{"rows": 3}', "TypeError"),
        "names.json": ('{"rows": ["xla"]}', "AttributeError"),
        "bare.json": ('{"rows": []}', "TypeError"),
        "other.json": (json.dumps(whole | {"rows": [{"task": "text"}]}), "TypeError"),
        "old.json": (json.dumps(whole | {"versions": {}}), "KeyError"),
    }
    for name, (content, reason) in wrong.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(SystemExit) as caught:
            table.main([str(path), "--readme", str(page)])
        sentence = caught.value.code
        assert sentence.startswith(f"error: {path} must be a file that python -m experiments.benchmarks.convolution")
        assert reason in sentence
        assert "\n" not in sentence
    assert page.read_text() == f"{table.BEGIN} old {table.END}"
    assert capsys.readouterr().out == ""


def test_pages_without_a_place_for_tables(tmp_path):
    record(row("xla", 1.0)).write(tmp_path / "a.json")
    (tmp_path / "bare.md").write_text("no markers")
    for page, reason in (("bare.md", "it must hold .*, each once"), ("missing.md", "No such file or directory")):
        expected = rf"^error: readme must be a page with the two markers; got .*{page} \({reason}\)\.$"
        with pytest.raises(SystemExit, match=expected):
            table.main([str(tmp_path / "a.json"), "--readme", str(tmp_path / page)])


def test_table_prefers_the_latest_and_names_its_sources():
    elsewhere = record(
        row("flashfftconv", 0.76, source="someone"), row("jnp_fft", 1.45, source="someone"), date="2026-11-27"
    )
    old = record(row("mosaic_gpu", 0.3), row("jnp_fft", 1.5), date="2026-11-24")
    new = record(row("mosaic_gpu", 0.2, errors={"y": 4.8e-3}, temporary_per_u=0.05), date="2026-11-25")
    failed = record(row("mosaic_gpu", None, status="failed"), date="2026-11-26")
    text = table.markdown([elsewhere, old, new, failed])
    assert "### Causal, bfloat16, forward, 49,152 rows" in text
    assert "| 1,024 | **0.200** | 1.50 | 0.760 [1] |  |  | 7.5x | 3.8x (flashfftconv) | 4.8e-03 | 0.05 |" in text
    assert "[1] someone" in text


def test_what_has_no_times_has_no_table():
    absent = row("mosaic_gpu", None, status="not measured", dtype="float16", reason="late")
    text = table.markdown([record(row("mosaic_gpu", 1.0), absent)])
    assert text.endswith("\n\nNot measured at all: causal, float16, forward.")
    assert text.count("###") == 1


def test_table_goes_between_its_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before {table.BEGIN} old {table.END} after")
    record(row("xla", 1234.5)).write(tmp_path / "a.json")
    table.main([str(tmp_path / "a.json"), "--readme", str(page)])
    assert page.read_text().startswith("before ")
    assert page.read_text().endswith(" after")
    assert "| 1,024 | not measured | **1,234** |" in page.read_text()
    assert " old " not in page.read_text()


def test_committed_results_are_in_the_readme():
    folder = table.README.parent
    text = table.markdown([Record.read(path) for path in sorted((folder / "results").glob("*.json"))])
    assert text in table.README.read_text()
