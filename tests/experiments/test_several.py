"""Sweeps: their variants, and several runs after one another that can be killed anywhere."""

import dataclasses
import functools
import io
import json
import os
import socket
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from experiments.common import command, several
from experiments.common.errors import RunError
from experiments.common.train import train
from experiments.lra.listops.recipe import SMOKE
from experiments.lra.train import RECIPES
from tests.experiments.conftest import ROOT
from tests.experiments.toy import Toy, rows_of


def test_the_regularizations_are_those_of_the_paper():
    variants = several.regularizations(SMOKE)
    options = {
        name: (one.kernel_init, one.squash_threshold, one.smooth_width)  # type: ignore[attr-defined]
        for name, one in variants.items()
    }
    assert options == {
        f"{init}-{way}": (init, threshold, width)
        for init in ("random", "geometric_decay")
        for way, threshold, width in (("none", 0, 1), ("smooth", 0, 7), ("squash", 0.002, 1), ("both", 0.002, 7))
    }
    same = dataclasses.replace(SMOKE, kernel_init="geometric_decay")
    assert variants["geometric_decay-squash"] == same  # nothing else is changed
    wide = several.regularizations(dataclasses.replace(SMOKE, smooth_width=3))
    assert wide["random-smooth"].smooth_width == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Toy(), "sweep regularization needs a recipe with the option kernel_init; got Toy."),
        (dataclasses.replace(SMOKE, squash_threshold=0.0), "squash_threshold must be above 0 for the sweep"),
    ],
)
def test_recipes_that_cannot_be_swept(recipe, message):
    with pytest.raises(RunError, match=message):
        several.regularizations(recipe)


def train_all(recipes, folder):
    output = io.StringIO()
    failed = several.train_all(recipes, folder, Console(file=output, width=200))
    return failed, output.getvalue()


def test_finished_runs_are_left_alone_and_others_go_on(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(several, "train", functools.partial(train, devices=jax.devices()[:1]))
    short = {"one": Toy(), "two": Toy(evaluate_every=15)}
    assert train_all({"one": short["one"]}, tmp_path / "several")[0] == {}
    before = (tmp_path / "several" / "one" / "run.json").read_bytes()
    failed, output = train_all(short, tmp_path / "several")
    assert failed == {}
    assert "1/2 one: finished before" in output
    assert (tmp_path / "several" / "one" / "run.json").read_bytes() == before
    assert len(rows_of(tmp_path / "several" / "two")) == 14
    # A run whose last checkpoint is gone is not finished.
    monkeypatch.setattr(several, "train", lambda recipe, folder, console: (_ for _ in ()).throw(KeyboardInterrupt))
    (tmp_path / "several" / "two" / "checkpoints" / "30").rename(tmp_path / "moved")
    with pytest.raises(KeyboardInterrupt):
        train_all(short, tmp_path / "several")
    with pytest.raises(RunError, match="started with another recipe, which differs in features"):
        train_all({"one": dataclasses.replace(short["one"], features=9)}, tmp_path / "several")
    with pytest.raises(RunError, match=r"workdir must be a folder for several runs; got .*, which is that of one"):
        train_all(short, tmp_path / "several" / "one")


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path, monkeypatch):
    done = []

    def diverging(recipe, folder, *, console):
        if recipe.seed == 0:
            raise FloatingPointError("the training loss is nan at step 1")
        done.append(folder.name)

    monkeypatch.setattr(several, "train", diverging)
    failed, output = train_all({"bad": Toy(), "good": Toy(seed=1)}, tmp_path)
    assert failed == {"bad": "the training loss is nan at step 1"}
    assert done == ["good"]
    assert "bad: the training loss is nan at step 1" in output


def sweep(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", "--task", "listops", "--preset", "smoke", *map(str, arguments)])
    command.main(RECIPES, prog="python -m experiments.lra.train")


def test_a_sweep_ends_with_a_page(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(command, "train_all", lambda recipes, folder, console: calls.append((list(recipes), folder)))
    monkeypatch.setattr(command, "collect", lambda folders, out, *_: calls.append((folders, out)))
    sweep(monkeypatch, "--sweep", "regularization", "--workdir", tmp_path)
    names = [f"{init}-{way}" for init in ("random", "geometric_decay") for way in ("none", "smooth", "squash", "both")]
    assert calls == [(names, tmp_path), ([tmp_path], tmp_path / "page")]
    with pytest.raises(SystemExit, match="profile_steps must be None in a sweep"):
        sweep(monkeypatch, "--sweep", "regularization", "--profile-steps", "1", "2", "--workdir", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_whole_sweep(tmp_path, monkeypatch, capsys):
    small = ("--steps", "2", "--evaluate-every", "2", "--checkpoint-every", "2", "--warmup-steps", "0")
    few = ("--num-layers", "1", "--squash-threshold", "0.0001", "--batch-size", "8")  # an example for each device
    sweep(monkeypatch, "--sweep", "regularization", *small, *few, "--workdir", tmp_path)
    text = (tmp_path / "page" / "index.html").read_text()
    assert text.count("kernels of ") == 8
    assert "Nothing: all runs are finished and whole." in text
    described = json.loads((tmp_path / "geometric_decay-both" / "run.json").read_text())
    assert described["recipe"]["smooth_width"] == 7


SWEEP_OF_TWO = """
from experiments.common import command, several
from experiments.lra.train import RECIPES

whole = several.SWEEPS["regularization"]
several.SWEEPS["regularization"] = lambda recipe: dict(list(whole(recipe).items())[::7])
command.main(RECIPES, prog="sweep")
"""


@pytest.mark.slow
def test_two_processes_sweep_together(compiled, tmp_path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"localhost:{listener.getsockname()[1]}"
    command = [sys.executable, "-c", SWEEP_OF_TWO, "--task", "listops", "--preset", "smoke", "--num-layers", "1"]
    command += ["--sweep", "regularization", "--workdir", str(tmp_path / "sweep"), "--steps", "3"]
    command += ["--distributed.coordinator", coordinator, "--distributed.num-processes", "2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | {name.upper(): str(value) for name, value in compiled.items()}
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen([*command, "--distributed.process-id", str(number)], stdout=subprocess.PIPE, **options)
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=250)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ["2/2 geometric_decay-both" in output for output in outputs] == [True, False]
    for name in ("random-none", "geometric_decay-both"):
        (start,) = json.loads((tmp_path / "sweep" / name / "run.json").read_text())["starts"]
        assert (start["process_count"], start["device_count"]) == (2, 2)
        assert (tmp_path / "sweep" / name / "checkpoints" / "3").is_dir()
    assert (tmp_path / "sweep" / "page" / "index.html").exists()
