"""The page of many runs: what it shows of whole ones, and what it says of those that are not."""

import importlib
import json
import sys
from dataclasses import asdict

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.checkpoints import Checkpoints
from experiments.common.train import State
from experiments.report import content, kernels, page, published, runs
from experiments.report.__main__ import main

OPTIONS = {"name": "ListOps", "seed": 0, "steps": 4, "architecture": "long_conv"}


def row(step, split, loss, accuracy, **timing):
    timing = {"seconds": step / 2, **({"examples_per_second": 40.0 + step} if split == "train" else {}), **timing}
    return {"step": step, "epoch": step / 10, "split": split, "loss": loss, "accuracy": accuracy, "timing": timing}


ROWS = [
    row(2, "train", 2.0, 0.2, peak_bytes=3_000_000),
    row(2, "validation", 1.9, 0.5),
    row(2, "test", 1.8, 0.4321),
    row(4, "train", 1.5, 0.3, peak_bytes=7_000_000),
    row(4, "validation", 1.6, 0.4),
    row(4, "test", 1.5, 0.9),
]


def workdir(folder, *, rows=ROWS, tail="", kernel=None, **options):
    """A folder as training leaves it."""
    folder.mkdir(parents=True)
    recipe = {**OPTIONS, "kernel_init": "random", "squash_threshold": 0.0, "smooth_width": 1, **options}
    start = {"step": 0, "device": "abacus", "device_count": 2, "parameters": 1234, "versions": {"jax": "0"}}
    (folder / "run.json").write_text(json.dumps({"recipe": recipe, "starts": [start]}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if kernel is not None:
        params = {"blocks": {"layer": {"kernel": kernel, "skip": jnp.ones(kernel.shape[:-1])}}, "head": jnp.ones(3)}
        with Checkpoints(folder / "checkpoints") as checkpoints:
            checkpoints.save(4, State(jnp.int32(4), params, {}, ()))
    return folder


def report(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    main()


def kernel_of(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 1, 3, 64)), jnp.float32)


def test_scores_stand_beside_the_published_ones(tmp_path, monkeypatch, capsys):
    folder = workdir(tmp_path / "run<1>", kernel=kernel_of())
    report(monkeypatch, folder, "--out", tmp_path / "page")
    assert capsys.readouterr().out == f"wrote {tmp_path}/page/index.html\n"
    text = (tmp_path / "page" / "index.html").read_text()
    assert "<b>43.21%</b>" in text  # where validation was best, and not the 90 % of the last step
    assert "run&lt;1&gt;" in text
    assert "run<1>" not in text
    for expected in ("60.3 % [R, recalled, unconfirmed]", "62.15 % [B]", "7 MB peak", "1,234", "2 × abacus"):
        assert expected in text
    assert text.count("data:image/png;base64,") == 3  # the task's curves, the run's, and its kernels
    assert "http" not in text  # self-contained
    assert "Nothing: all runs are finished and whole." in text


def test_markdown_has_its_pictures_beside_it(tmp_path, monkeypatch):
    folder = workdir(tmp_path / "run", kernel=kernel_of())
    report(monkeypatch, folder, "--out", tmp_path / "page", "--format", "markdown")
    text = (tmp_path / "page" / "report.md").read_text()
    for name in ("curves-listops.png", "curves-run.png", "kernels-run.png"):
        assert f"({name})" in text
        assert (tmp_path / "page" / name).read_bytes().startswith(b"\x89PNG")
    assert "| `run` | long_conv | **43.21%** | test | 2 of 4 | 1,234 | 43 | 7 MB peak | 2 × abacus |" in text


def test_what_is_unfinished_killed_or_corrupt_is_named(tmp_path, monkeypatch):
    sound = workdir(tmp_path / "sound", kernel=kernel_of())
    short = workdir(tmp_path / "short", rows=ROWS[:3], tail='{"step": 3, "spl')
    odd = workdir(tmp_path / "odd", rows=[*ROWS[:2], {"step": "two"}, *ROWS[2:]], kernel=kernel_of())
    for file in (odd / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(b"torn")
    at_once = workdir(tmp_path / "at_once", rows=[])
    no_run = tmp_path / "no_run"
    no_run.mkdir()
    torn = workdir(tmp_path / "torn")
    (torn / "run.json").write_text('{"recipe": ')
    folders = (sound, short, odd, at_once, no_run, torn, tmp_path / "nowhere")
    report(monkeypatch, *folders, "--out", tmp_path / "page", "--format", "markdown")
    text = (tmp_path / "page" / "report.md").read_text()
    for expected in (
        "`short`: the last line of metrics.jsonl is torn and left out.",
        "`short`: unfinished: 2 of 4 steps are in its metrics.",
        "`short`: there is no checkpoint, so the kernels are not shown.",
        "`odd`: line 3 of metrics.jsonl is no row of metrics and left out.",
        "`odd`: the checkpoint of step 4 cannot be read (",
        "`at_once`: unfinished: 0 of 4 steps are in its metrics.",
        f"left out: {no_run} is no folder of a run: run.json cannot be read (No such file or directory).",
        f"left out: {torn}/run.json does not describe a run (JSONDecodeError",
        f"left out: {tmp_path}/nowhere is no folder of a run",
    ):
        assert expected in text
    assert "`sound`:" not in text


def test_without_any_run_nothing_is_written(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: workdirs must be folders of runs; got .*, and none is\.$"):
        report(monkeypatch, tmp_path, "--out", tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SystemExit, match=r"^error: out must be a folder that can be written to; got .*file"):
        report(monkeypatch, workdir(tmp_path / "run"), "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_sweep_is_a_table_with_the_smoothness_of_its_kernels(tmp_path, monkeypatch):
    workdir(tmp_path / "sweep" / "random-none", kernel=kernel_of())
    workdir(tmp_path / "sweep" / "random-smooth", kernel=kernel_of(), smooth_width=7)
    report(monkeypatch, tmp_path / "sweep", "--out", tmp_path / "page", "--format", "markdown")
    lines = (tmp_path / "page" / "report.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| random | ")]
    assert [(cells[1], cells[2], cells[4]) for cells in rows] == [
        ("none", "`random-none`", "53.4 % [R, recalled, unconfirmed]"),
        ("smooth", "`random-smooth`", "59.8 % [R, recalled, unconfirmed]"),
    ]
    (rough, smooth) = [[float(cell.split()[0]) for cell in cells[5:7]] for cells in rows]
    assert 1.2 < rough[0] < 1.6  # the square root of 2, for many taps
    assert 0.35 < rough[1] < 0.65
    assert smooth[0] < 0.6
    assert smooth[1] < 0.15
    written = json.loads((tmp_path / "page" / "kernels-random-none.json").read_text())
    assert np.shape(written["normalised_total_variation"]) == (2, 1, 3)


def test_smoothness_by_hand():
    taps = np.array([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found = kernels.Kernels(1, taps[None, None], taps[None, None])
    np.testing.assert_allclose(found.variation()[0, 0], [6 / 4, 0, np.nan, 1], atol=1e-6)
    energy = np.abs(np.fft.fft(taps, 8)) ** 2
    with np.errstate(invalid="ignore"):
        share = energy[:, 3:6].sum(-1) / energy.sum(-1)  # of frequencies 3, 4 and -3 of 8
    np.testing.assert_allclose(found.high_frequencies()[0, 0], share, atol=1e-6)
    np.testing.assert_allclose(found.alive()[0, 0], [1, 1, 0, 1 / 4])
    assert kernels.summary(np.array([np.nan])) == "–"
    assert json.loads(kernels.every_kernel(found))["share_of_taps_alive"] == [[[1, 1, 0, 0.25]]]


def test_used_kernels_are_smoothed_then_squashed(tmp_path):
    folder = workdir(tmp_path / "run", kernel=kernel_of(), smooth_width=3, squash_threshold=0.1)
    found, problems = kernels.read(folder, runs.read(folder).recipe)
    assert problems == []
    assert found.step == 4
    stored = np.asarray(kernel_of(), np.float64)
    mean = (np.pad(stored, ((0, 0),) * 3 + ((1, 1),))[..., [[i, i + 1, i + 2] for i in range(64)]]).mean(-1)
    expected = np.sign(mean) * np.maximum(np.abs(mean) - 0.1, 0)
    np.testing.assert_allclose(found.used, expected, atol=2e-7)  # measured 6e-8


def test_a_run_that_departs_from_the_papers_recipe_is_said_to(tmp_path):
    from experiments.lra.train import RECIPES

    paper = json.loads(json.dumps(vars(RECIPES["listops"]["paper"]), default=str))
    same = runs.read(workdir(tmp_path / "same", **paper))
    other = runs.read(workdir(tmp_path / "other", **paper | {"features": 7}))
    assert content.departures(same) == {}
    assert content.departures(other) == {"features": (7, 128)}
    assert content.departures(runs.read(workdir(tmp_path / "new", name="Unheard"))) is None
    assert "other" in content.caveat([same, other])
    assert "same" not in content.caveat([same, other]).split("reproduction")[1]


@pytest.mark.parametrize(
    ("family", "task", "preset"),
    [
        ("fmri", "prediction", "paper"),
        ("fmri", "decoding", "paper"),
        ("images", "cifar2d", "paper"),
        ("language", "wikitext", "355M"),
        ("language", "stdlib", "125M-h3"),
        ("digits", "digits", "default"),
    ],
)
def test_each_task_is_compared_with_its_own_preset(tmp_path, family, task, preset):
    recipe = importlib.import_module(f"experiments.{family}.train").RECIPES[task][preset]
    options = json.loads(json.dumps({"name": type(recipe).__name__, **asdict(recipe)}, default=str))
    run = runs.read(workdir(tmp_path / "run", **options | {"batch_size": 7, "state_sharding": "sharded"}))
    found = content.preset_of(run)
    assert found.name == preset
    differing = {name: value for name, value in content.departures(run).items() if name in options}
    assert differing == {"batch_size": (7, recipe.batch_size)}


def test_every_published_figure_has_a_tag_that_is_explained():
    tags = published.tags()
    figures = [figure for benchmark in published.benchmarks() for figure in benchmark.published]
    assert {figure.tag for figure in figures} | {speed.tag for speed in published.speeds()} <= set(tags)
    assert all("unconfirmed" in figure.value("%") for figure in figures if figure.tag == "R")
    assert published.Figure("S5", None, "B").value("%") == "did not learn [B]"


def test_names_tell_runs_apart(tmp_path):
    assert runs.shortest_names([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert runs.shortest_names([]) == []


def test_markup_is_escaped():
    table = page.Table(["a|b"], [["<x> `c<d` **e**"]])
    assert "<td>&lt;x&gt; <code>c&lt;d</code> <b>e</b></td>" in page.as_html(table)
    assert page.as_markdown(table).splitlines()[0] == "| a\\|b |"
