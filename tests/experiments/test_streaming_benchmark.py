"""The benchmark of streaming: right results are timed, written and drawn; wrong ones end it."""

import json

import jax.numpy as jnp
import pytest

from experiments.benchmarks import streaming


def test_a_small_run_prints_writes_and_draws(tmp_path, capsys):
    streaming.main(["--positions", "64", "32", "--features", "2", "--repeats", "1", "--out", str(tmp_path)])
    assert "Microseconds a token" in capsys.readouterr().out
    (written,) = tmp_path.glob("streaming_cpu_*.json")
    assert written.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 2
    record = json.loads(written.read_text())
    assert record["clock"] == "process"
    assert [(row["position"], row["method"]) for row in record["rows"]] == [
        (position, method) for position in (32, 64) for method in ("tiled", "direct", "recompute")
    ]
    assert all(row["microseconds"] > 0 and 0 < row["error"] < streaming.TOLERANCE for row in record["rows"])


def test_a_wrong_result_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "METHODS", {"recompute": streaming.METHODS["recompute"]})
    monkeypatch.setattr(streaming, "show", lambda *_: None)
    monkeypatch.setattr(streaming, "recompute", lambda u, kernel: (jnp.ones(u.shape[:-1]),))
    with pytest.raises(SystemExit, match="these are not the convolution"):
        streaming.main(["--positions", "8", "--features", "2", "--repeats", "1", "--out", str(tmp_path)])


def test_positions_are_even():
    with pytest.raises(SystemExit):
        streaming.parse(["--positions", "33"])
