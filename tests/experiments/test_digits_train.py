"""A short run of the digits experiment: what it leaves behind, and how it says what went wrong."""

import json
import shutil
import sys

import pytest

from experiments.common import command
from experiments.digits import data, train
from experiments.digits.recipe import Digits

TINY = {"steps": 4, "batch_size": 8, "layers": 1, "features": 4, "channels": 1, "warmup_steps": 0}
TINY |= {"log_every": 1, "evaluate_every": 2, "checkpoint_every": 2}


@pytest.fixture
def few(monkeypatch):
    """A few rows of the data."""
    splits = [
        data.Split(split.pixels[:rows], split.labels[:rows]) for split, rows in zip(data.load(), (24, 16), strict=True)
    ]
    monkeypatch.setattr(data, "load", lambda: splits)


@pytest.fixture
def run(monkeypatch, compiled):
    """Runs the command with the tiny recipe and other options."""
    monkeypatch.setattr(train, "RECIPES", {"digits": {"default": Digits(**TINY)}})

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        command.main(train.RECIPES, "python -m experiments.digits.train", train.draw)

    return run


def reproducible(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def test_a_run_leaves_a_report_and_goes_on_to_the_bit(few, run, tmp_path, capsys):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run("--workdir", whole)
    assert "test accuracy" in capsys.readouterr().out
    pictures = {"kernels.png", "learning_curves.png", "spectra.png"}
    assert {path.name for path in whole.iterdir()} == {"run.json", "metrics.jsonl", "checkpoints"} | pictures
    for name in pictures:
        content = (whole / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
    rows = reproducible(whole)
    assert [(row["step"], row["split"]) for row in rows if row["split"] == "test"] == [(2, "test"), (4, "test")]
    assert all(row["accuracy"] * 16 == round(row["accuracy"] * 16) for row in rows if row["split"] == "test")

    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    run("--workdir", resumed)
    assert "going on from step 2" in capsys.readouterr().out
    assert reproducible(resumed) == rows


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "at least 1"),
        ("layers", 0, "at least 1"),
        ("features", -3, "at least 1"),
        ("channels", 0, "at least 1"),
        ("shift", 32, "from 0 to 31"),
        ("kernel_learning_rate", float("nan"), "at least 0 and finite"),
        ("squash_threshold", -0.001, "at least 0"),
        ("warmup_steps", 999, "from 0 to below the 448 steps of the schedule"),
        ("kernel_dropout_rate", 1.0, "from 0 to below 1"),
    ],
)
def test_options_say_what_they_expect(name, value, expected):
    with pytest.raises(ValueError, match=rf"^{name} must be {expected}; got {value}\.$"):
        Digits(**{name: value})


def test_command_says_in_a_sentence_what_is_wrong(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(SystemExit, match=r"^error: workdir must be a folder .* got .*file") as caught:
        run("--workdir", file)
    assert isinstance(caught.value.code, str)  # printed as it is, with an exit status of 1
    assert file.read_text() == "precious"


def test_help_shows_every_option_and_its_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as caught:
        command.main(train.RECIPES, "python -m experiments.digits.train")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in Digits.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert "handwritten digits" in text
    assert str(Digits().kernel_learning_rate) in text
