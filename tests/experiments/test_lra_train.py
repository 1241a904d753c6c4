"""Long Range Arena's training command: short runs, and how it says what went wrong."""

import dataclasses
import io
import json
import sys

import jax
import pytest
from rich.console import Console

from experiments.common.command import main
from experiments.common.train import train
from experiments.lra.listops.recipe import SMOKE
from experiments.lra.train import RECIPES


def run(recipe, folder):
    return train(recipe, folder, devices=jax.devices()[:1], console=Console(file=io.StringIO(), width=100))


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_short_rows_are_learned(tmp_path):
    """Measured: 0.336 of the validation rows, where the most frequent value has a share of about 0.15."""
    recipe = dataclasses.replace(
        SMOKE,
        steps=400,
        batch_size=32,
        features=32,
        num_layers=2,
        channels=2,
        max_length=128,
        kernel_learning_rate=0.01,
        squash_threshold=0.001,
        kernel_dropout_rate=0.0,
        min_tokens=20,
        max_tokens=127,
        train_rows=12_800,
        validation_rows=500,
        test_rows=500,
        warmup_steps=20,
        evaluate_every=400,
        log_every=50,
        checkpoint_every=400,
    )
    run(recipe, tmp_path / "w")
    last = metrics_of(tmp_path / "w")[-2]
    assert last["split"] == "validation"
    assert last["accuracy"] > 0.28


def sentence(monkeypatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train", "--task", "listops", "--preset", "smoke", *arguments])
    with pytest.raises(SystemExit) as caught:
        main(RECIPES, prog="python -m experiments.lra.train")
    assert isinstance(caught.value.code, str)  # printed as it is, with an exit status of 1
    return caught.value.code


def test_missing_files_are_a_sentence(monkeypatch, tmp_path):
    given = ("--workdir", str(tmp_path / "w"), "--batch-size", "8", "--tsv-dir", str(tmp_path / "tsv"))
    text = sentence(monkeypatch, *given)
    assert text.startswith("error: tsv_dir must be a folder with basic_train.tsv, basic_val.tsv and basic_test.tsv")
    assert text.endswith("which lacks basic_train.tsv, basic_val.tsv, basic_test.tsv.")


def test_a_malformed_row_is_a_sentence(monkeypatch, tmp_path):
    for name in ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"):
        (tmp_path / name).write_text("Source\tTarget\n( ( ( [SM 7 ) 8 ) ] )\t50\n")
    text = sentence(monkeypatch, "--workdir", str(tmp_path / "w"), "--batch-size", "8", "--tsv-dir", str(tmp_path))
    expected = f"{tmp_path}/basic_train.tsv, line 2: expected a value from 0 to 9 behind the tab; got '50'."
    assert text == f"error: {expected}"


def test_a_data_folder_that_cannot_be_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("precious")
    given = ("--workdir", str(tmp_path / "w"), "--batch-size", "8", "--data-dir", str(tmp_path / "file"))
    text = sentence(monkeypatch, *given)
    assert text.startswith(f"error: {tmp_path}/file/listops/")
    assert "must be a folder that can be made and written to; got Not a directory." in text


def test_a_wrong_option_is_a_sentence(monkeypatch, tmp_path):
    assert "min_tokens must be from 1 to max_tokens = 60; got 70." in sentence(monkeypatch, "--min-tokens", "70")


def test_help_shows_the_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--task", "listops", "--preset", "small", "--help"])
    with pytest.raises(SystemExit) as caught:
        main(RECIPES, prog="python -m experiments.lra.train")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--task", "--preset", "--workdir", "--squash-threshold", "--implementation", "--dtype", "--tsv-dir"):
        assert option in text
