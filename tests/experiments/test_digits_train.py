"""A short run of the digits experiment: what it leaves behind, and how it says what went wrong."""

import io
import json
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.digits import data, train
from experiments.digits.config import Config
from experiments.digits.report import Report

TINY = {"epochs": 2, "batch_size": 8, "layers": 1, "features": 4, "channels": 1, "warmup_epochs": 0.0}


def run(folder, *, terminal=False, **options):
    """A few steps on a few rows: the output and the last state."""
    few = [split.take(slice(0, rows)) for split, rows in zip(data.load(), (24, 16), strict=True)]
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100)
    state = train.train(Config(**TINY | options), *few, Report(folder), console)
    return output.getvalue(), state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "report"
    return folder, *run(folder)


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_report_is_complete(finished):
    folder, _, _ = finished
    pictures = ["kernels.png", "learning_curves.png", "spectra.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["config.json", "metrics.jsonl", *pictures])
    for name in pictures:
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_metrics_have_a_row_for_each_epoch(finished):
    rows = rows_of(finished[0])
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row.keys() == {
            "epoch",
            "train_loss",
            "train_accuracy",
            "gradient_norm",
            "test_loss",
            "test_accuracy",
            "seconds",
        }
        assert np.isfinite(list(row.values())).all()
        assert row["test_accuracy"] * 16 == round(row["test_accuracy"] * 16)
    assert rows[0]["seconds"] < rows[1]["seconds"]


def test_every_parameter_learns(finished):
    _, _, state = finished
    config = Config(**TINY)
    model = train.make_model(config)
    before = train.initial_state(config, model, train.make_optimizer(config, 3)).params
    same = jax.tree.map(lambda old, new: bool((old == new).all()), before, state.params)
    assert not any(jax.tree.leaves(same)), same


def test_output_off_a_terminal_is_plain_lines(finished):
    _, output, _ = finished
    assert "\x1b" not in output
    assert "\r" not in output
    assert output.startswith("epoch  1/2   train loss ")
    assert "test accuracy" in output
    assert "missed" in output


def test_a_run_repeats_and_a_terminal_sees_a_bar(finished, tmp_path):
    output, _ = run(tmp_path / "report", terminal=True)
    assert "━" in output
    assert "training" in output
    first, second = rows_of(finished[0]), rows_of(tmp_path / "report")
    for row in (*first, *second):
        del row["seconds"]
    assert first == second


def test_stops_where_the_loss_is_not_finite(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the training loss is nan at step \d of epoch 1.*learning_rate = 1e"):
        run(tmp_path / "report", learning_rate=1e30)
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["config.json", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 0, "at least 1"),
        ("layers", 0, "at least 1"),
        ("features", -3, "at least 1"),
        ("channels", 0, "at least 1"),
        ("batch_size", 0, "from 1 to 1397, the training images"),
        ("batch_size", 1398, "from 1 to 1397, the training images"),
        ("shift", 32, "from 0 to 31"),
        ("learning_rate", -0.1, "at least 0"),
        ("kernel_learning_rate", float("nan"), "at least 0"),
        ("weight_decay", -1.0, "at least 0"),
        ("squash_threshold", -0.001, "at least 0"),
        ("warmup_epochs", 99.0, "from 0 to below epochs = 8"),
        ("kernel_dropout_rate", 1.0, "from 0 to below 1"),
    ],
)
def test_options_say_what_they_expect(name, value, expected):
    with pytest.raises(ValueError, match=rf"^{name} must be {expected}; got {value}\.$"):
        Config(**{name: value})


def command(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    train.main()


def test_command_says_in_a_sentence_what_is_wrong(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(SystemExit, match=r"^error: report_dir must be a folder .* got .*file") as caught:
        command(monkeypatch, "--report-dir", str(file))
    assert isinstance(caught.value.code, str)  # printed as it is, with an exit status of 1
    assert file.read_text() == "precious"


def test_command_reports_what_breaks_a_run(monkeypatch, tmp_path):
    def full_disk(*arguments):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(train, "train", full_disk)
    with pytest.raises(SystemExit, match=r"^error: .*No space left on device.*What was measured so far is in .*report"):
        command(monkeypatch, "--report-dir", str(tmp_path / "report"))


def test_help_shows_every_option_and_its_default(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert "handwritten digits" in text
    assert str(Config().kernel_learning_rate) in text
