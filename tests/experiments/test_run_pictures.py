"""What is made of the files of a run: learning curves and the table of a profile."""

import gzip
import json
import re
import sys

import pytest

from experiments.common import figures, profile
from tests.experiments.toy import rows_of


def run_main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    module.main()


def test_learning_curves(finished, tmp_path, monkeypatch):
    rows = rows_of(finished[0])
    assert figures.learning_curves(rows, target=0.9).startswith(b"\x89PNG")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": ')
    run_main(figures, monkeypatch, tmp_path)
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [None, "", "{", "[]\n"])
def test_what_has_no_curves(tmp_path, monkeypatch, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=r"^error: .*(workdir must be the folder of a run|has no rows yet)"):
        run_main(figures, monkeypatch, tmp_path)


def name(what, pid, value, tid=None):
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": value}}


GPU = [
    name("process_name", 1, "/device:GPU:0"),
    name("thread_name", 1, "Stream #7(compute)", 2),
    name("thread_name", 1, "XLA Modules", 3),
    {"ph": "X", "pid": 1, "tid": 2, "name": "kernel", "dur": 3000},
    {"ph": "X", "pid": 1, "tid": 2, "name": "kernel", "dur": 1000},
    {"ph": "X", "pid": 1, "tid": 2, "name": "copy", "dur": 1000},
    {"ph": "X", "pid": 1, "tid": 3, "name": "jit_train_step", "dur": 9000},
]
CPU = [
    name("process_name", 5, "/host:CPU"),
    name("thread_name", 5, "tf_XLAEigen", 6),
    {"ph": "X", "pid": 5, "tid": 6, "name": "fft.1", "dur": 500, "args": {"hlo_op": "fft.1"}},
    {"ph": "X", "pid": 5, "tid": 6, "name": "python", "dur": 9000, "args": {}},
]


def traced(folder, events):
    place = folder / "profile" / "plugins"
    place.mkdir(parents=True)
    with gzip.open(place / "vm.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)


def test_operations_of_a_gpu_are_those_of_its_streams(tmp_path, monkeypatch, capsys):
    traced(tmp_path, GPU + CPU)
    run_main(profile, monkeypatch, tmp_path, "--steps", 2)
    printed = capsys.readouterr().out
    assert "2.500 ms of operations for each of 2 steps" in printed
    assert re.search(r"2\.000 .* 80\.0% .* 1 .* kernel", printed)
    assert "jit_train_step" not in printed


def test_operations_of_a_cpu_are_those_of_xla(tmp_path):
    traced(tmp_path, CPU)
    assert profile.read(tmp_path).microseconds == {"fft.1": 500}


def test_a_run_without_a_trace(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: workdir must be the folder of a run with --profile-steps; got"):
        run_main(profile, monkeypatch, tmp_path)
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "x.trace.json.gz").write_bytes(b"torn")
    with pytest.raises(SystemExit, match=r"^error: .*is no trace that can be read"):
        run_main(profile, monkeypatch, tmp_path)


@pytest.mark.parametrize("option", ["--steps", "--rows"])
def test_a_profile_of_no_steps_or_rows(tmp_path, monkeypatch, capsys, option):
    with pytest.raises(SystemExit):
        run_main(profile, monkeypatch, tmp_path, option, 0)
    assert f"{option} must be at least 1; got 0" in capsys.readouterr().err
