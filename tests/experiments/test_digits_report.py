"""The report folder: what a wrong one is answered with, and that nothing is ever lost."""

import json
from pathlib import Path

import pytest

from experiments.digits.config import Config
from experiments.digits.report import Report


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("exists", [True, False])
def test_takes_a_new_or_an_empty_folder(tmp_path, exists):
    folder = tmp_path / "a" / "b"
    if exists:
        folder.mkdir(parents=True)
    Report(folder)
    assert contents(folder) == {"metrics.jsonl": b""}


def test_default_folders_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = Report(None), Report(None)
    assert first.folder != second.folder
    assert first.folder.parent == Path("reports/digits")


def test_refuses_a_folder_that_holds_anything(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(ValueError, match=r"report_dir must be a new or an empty folder.*got .* holds metrics\.jsonl"):
        Report(tmp_path)
    assert contents(tmp_path) == {"metrics.jsonl": b"precious"}


@pytest.mark.parametrize("below", ["", "report"])
def test_refuses_a_folder_that_cannot_be(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(ValueError, match=r"report_dir must be a folder that can be made and written to; got .*file"):
        Report(file / below)
    assert contents(tmp_path) == {"file": b"precious"}


def test_refuses_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    # Not by permissions: those do not bind root, as whom containers often run the tests.
    def read_only(self, *args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(ValueError, match=r"can be made and written to; got .* \(Read-only file system\)"):
        Report(tmp_path)


def test_metrics_are_lines_of_json(tmp_path):
    report = Report(tmp_path / "report")
    report.log(epoch=1, test_accuracy=0.5)
    report.log(epoch=2, test_accuracy=0.75)
    lines = (report.folder / "metrics.jsonl").read_text().splitlines()
    assert (
        [json.loads(line) for line in lines]
        == report.rows
        == [
            {"epoch": 1, "test_accuracy": 0.5},
            {"epoch": 2, "test_accuracy": 0.75},
        ]
    )


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_is_written_survives_a_failing_write(tmp_path, monkeypatch, failure):
    report = Report(tmp_path / "report")
    report.log(epoch=1)
    before = contents(report.folder)

    def fail(descriptor):
        raise failure

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(type(failure)):
        report.log(epoch=2)
    assert contents(report.folder) == before


def test_describes_what_is_needed_to_run_again(tmp_path):
    report = Report(tmp_path / "report")
    report.describe(Config(seed=3, report_dir=report.folder))
    described = json.loads((report.folder / "config.json").read_text())
    assert described["config"]["seed"] == 3
    assert described["config"]["report_dir"] == str(report.folder)
    assert {"python", "jax", "flax", "flashbutterfly-jax"} <= described["versions"].keys()
