"""Pictures of data sets, and the speed of their loaders."""

import json
import re
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from experiments.data import figures, registry, show, throughput
from experiments.data.samples import Pictures, Samples, Series, Texts
from experiments.data.show import Show
from experiments.data.throughput import Throughput

QUIET = Console(quiet=True)
HERE = ["listops", "text", "retrieval", "image", "scifar", "cifar2d", "pathfinder32", "fmri"]  # the fast ones


@pytest.mark.parametrize("task", HERE)
def test_a_data_set_has_a_picture_without_preparation(tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    path = show.show(Show(task, count=5), QUIET)
    assert str(path) == f"reports/data/{task}.png"
    picture = imread(path)
    assert picture[..., :3].std() > 0.02  # something is drawn
    assert [entry.name for entry in tmp_path.iterdir()] == ["reports"]


@pytest.mark.parametrize("task", HERE)
def test_samples_are_as_many_as_asked_for_and_follow_the_seed(task):
    load = registry.loader(task)
    first, again, other = load(None, 3, 0), load(None, 3, 0), load(None, 3, 1)
    assert len(first.labels) == 3

    def content(samples: Samples) -> list:
        if isinstance(samples, Series):
            return [one.tolist() for one in samples.values]
        return samples.images.tolist() if isinstance(samples, Pictures) else list(samples.texts)

    assert len(content(first)) == 3
    assert content(first) == content(again)
    assert content(first) != content(other)


def test_what_is_made_up_says_so():
    for task in ("text", "retrieval", "image", "scifar", "cifar2d", "fmri"):
        assert registry.loader(task)(None, 1, 0).source.startswith("made")
    for task in ("listops", "pathfinder32"):
        assert registry.loader(task)(None, 1, 0).source == "generated, seed 0"


def test_the_real_images_are_shown_with_their_names(tmp_path, monkeypatch):
    from experiments.images.cifar import published, stand_in

    images = stand_in.draw(20, 0)
    monkeypatch.setattr(published, "read", lambda *unused, **options: (images, images))
    samples = registry.loader("cifar2d")(tmp_path, 4, 0)
    assert samples.source == f"CIFAR-10 in {tmp_path}, training"
    assert set(samples.labels) <= set(published.CLASSES)


def test_every_form_has_a_picture():
    rng = np.random.default_rng(0)
    many = [
        Pictures("here", ["a", "b"], rng.integers(0, 256, (2, 9, 7, 3), np.uint8)),
        Texts("here", ["a", "b"], ["$\\alpha <short>$", "long \0\n" * 900]),
        Series("here", ["a", "b"], [rng.normal(size=(30, 9)), np.zeros((20, 2))], [0.7, 2.0]),
    ]
    for samples in many:
        assert figures.draw(samples, "title").startswith(b"\x89PNG")
    with pytest.raises(TypeError, match="samples must be Pictures, Texts or Series; got Samples"):
        figures.draw(Samples("here", []), "title")


def test_every_task_of_the_command_is_registered():
    assert set(registry.SAMPLES) == set(show.Task.__value__.__args__)
    assert set(registry.SOURCES) <= set(registry.SAMPLES)
    for task in registry.SOURCES:
        assert callable(registry.source(task))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "listops", "--count", "0"], r"count must be from 1 to 100; got 0\."),
        (["--task", "listops", "--seed", "-1"], r"seed must be at least 0; got -1\."),
        (
            ["--task", "listops", "--count", "1", "--out", "{}/file/x.png"],
            r"out must be a file that can be written; got",
        ),
        (["--task", "image", "--data-dir", "{}"], r".*cifar-10-binary\.tar\.gz must have 170,052,171 bytes; got 4"),
        (["--task", "retrieval", "--data-dir", "{}"], r"tsv_dir must be a folder with new_aan_pairs\.train\.tsv"),
    ],
)
def test_command_says_in_a_sentence_what_is_wrong(tmp_path, monkeypatch, given, message):
    (tmp_path / "file").touch()
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"none")
    monkeypatch.setattr(sys, "argv", ["show", *(argument.format(tmp_path) for argument in given)])
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        show.main()


def test_unknown_tasks_are_a_sentence():
    with pytest.raises(ValueError, match=r"^task must be one of listops, text, .*; got 'mnist'\.$"):
        registry.loader("mnist")
    with pytest.raises(ValueError, match=r"^task must be one of listops, text, .*; got 'mnist'\.$"):
        registry.source("mnist")
    with pytest.raises(ValueError, match=r"^tasks must be among listops, .*; got mnist\.$"):
        throughput.measure(Throughput(("mnist",)), QUIET)
    with pytest.raises(ValueError, match=r"^seconds must be from 0\.01 to 600; got 0\.$"):
        throughput.measure(Throughput(("image",), seconds=0), QUIET)


# throughput


def step_times(folder, **changes):
    row = {"task": "pathfinder", "architecture": "long_conv", "implementation": "xla", "dtype": "float32"}
    rows = [
        row | {"examples_per_second": 4000.0},
        row | {"examples_per_second": 9000.5, "implementation": "mosaic_gpu"},
        row | {"examples_per_second": 99999.0, "architecture": "transformer"},
        row | {"examples_per_second": None, "task": "image"},
    ]
    path = folder / "step_times.json"
    path.write_text(json.dumps({"device": "A GPU", "tiny": False, "rows": rows} | changes))
    return path


def test_loaders_are_measured_beside_the_need_of_a_step(tmp_path, monkeypatch, capsys):
    for task in ("pathfinder32", "image"):
        monkeypatch.setitem(registry.SOURCES, task, registry.SOURCES[task]._replace(rows=200))
    out = tmp_path / "results" / "throughput.json"
    given = ["--tasks", "pathfinder32", "image", "--seconds", "0.05", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["throughput", *given, "--step-times", str(step_times(tmp_path))])
    throughput.main()
    record = json.loads(out.read_text())
    assert record["unit"] == "examples per second"
    first, second = record["rows"]
    assert (first["task"], first["batch_size"], first["needed"]) == ("pathfinder32", 64, 9000.5)
    assert first["needed_by"] == "A GPU, mosaic_gpu, float32"
    assert (second["task"], second["needed"], second["needed_by"]) == ("image", None, None)
    for row in record["rows"]:
        assert row["alone"] > 2000  # measured 50,000 and more on one core
        assert row["in_training"] > 100
    text = capsys.readouterr().out
    assert "not measured" in text
    assert "9,00" in text


def test_large_images_are_read_from_disk_as_in_training(tmp_path):
    from experiments.lra.pathfinder.dataset import Records

    source = registry.source("path256")(tmp_path, 4)
    assert isinstance(source, Records)
    assert source[3]["inputs"].shape == (65_536, 1)


def test_brain_data_are_windows_of_the_published_width(tmp_path):
    source = registry.source("fmri")(tmp_path, 3)
    assert len(source) == 3
    assert source[2]["bold"].shape == (50, 1024)


@pytest.mark.parametrize("changes", [{"tiny": True}, {"rows": [{"task": "image"}]}, {"rows": None}])
def test_other_files_are_not_step_times(tmp_path, changes):
    path = step_times(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"^step_times must be files that .* wrote; got {re.escape(str(path))}"):
        throughput.needed([path])
