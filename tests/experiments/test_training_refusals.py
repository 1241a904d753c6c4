"""What is wrong from outside is said in one sentence, and nothing that exists is touched."""

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import command, train, workdir
from experiments.common.checkpoints import Checkpoints, checksums
from experiments.common.errors import RunError
from experiments.common.workdir import Metrics
from tests.experiments.toy import RECIPES, Toy, rows_of


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(toy_run, folder: Path, sentence: str, recipe: Toy | None = None, **options) -> None:
    """The run ends with this sentence, and the files stay as they are."""
    before = contents(folder) if folder.is_dir() else None
    with pytest.raises(RunError, match=sentence):
        toy_run(folder, recipe, **options)
    assert (contents(folder) if folder.is_dir() else None) == before


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_a_changed_recipe_is_named_field_by_field(toy_run, run):
    sentence = (
        r"^the run in .*run was started with another recipe, which differs in learning_rate \(was 0\.05, now 0\.1\), "
        r"features \(was 8, now 4\); choose another workdir, or the recipe of its run\.json\.$"
    )
    refused(toy_run, run, sentence, Toy(learning_rate=0.1, features=4))


def test_another_field_of_the_recipe_is_a_change(toy_run, run):
    described = json.loads((run / "run.json").read_text())
    del described["recipe"]["norm"]
    (run / "run.json").write_text(json.dumps(described))
    refused(toy_run, run, r"differs in norm \(was absent, now batch\)")


@pytest.mark.parametrize("content", ["", "[]", '{"recipe": 3, "starts": []}', '{"recipe": {}, "starts": 3}', "{"])
def test_run_json_of_something_else(toy_run, run, content):
    (run / "run.json").write_text(content)
    refused(toy_run, run, r"^.*run\.json does not describe a run, so that .* cannot go on; choose another workdir\.$")


def test_a_folder_of_something_else(toy_run, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    refused(
        toy_run, tmp_path, r"^workdir must be new, empty, or .*; got .*, which holds thesis\.tex and no run\.json\.$"
    )


@pytest.mark.parametrize("below", ["", "run"])
def test_a_folder_that_cannot_be(toy_run, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("precious")
    refused(toy_run, file / below, r"^workdir must be a folder that can be made and written to; got .*file.* \(.*\)\.$")
    assert contents(tmp_path) == {"file": b"precious"}


def test_a_folder_that_cannot_be_written_to(toy_run, run, monkeypatch):
    # Not by permissions: those do not bind root, as whom containers often run the tests.
    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(workdir, "write_whole", read_only)
    refused(toy_run, run, r"that can be made and written to; got .* \(Read-only file system\)\.$")


def test_a_batch_that_the_devices_cannot_share(toy_run, tmp_path):
    sentence = r"^batch_size must be a multiple of the 8 devices, such as 8 or 16; got 12\.$"
    refused(toy_run, tmp_path / "run", sentence, Toy(batch_size=12), devices=8)
    refused(toy_run, tmp_path / "run", "such as 8; got 6", Toy(batch_size=6), devices=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [(0, 3), (4, 3), (2, 31), (30, 30)])
def test_steps_to_profile_that_will_not_be_made(toy_run, run, steps):
    refused(toy_run, run, r"^profile_steps must be a first and a last step from 31 to 30", profile_steps=steps)


def test_what_the_task_refuses(toy_run, tmp_path, monkeypatch):
    def refuse(self):
        raise ValueError("data_dir must hold rows; got nothing.")

    monkeypatch.setattr(Toy, "build", refuse)
    with pytest.raises(RunError, match=r"^data_dir must hold rows; got nothing\.$"):
        toy_run(tmp_path / "run")


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint(toy_run, run, damage):
    damage(largest_file(run / "checkpoints" / "30"))
    sentence = (
        r"^the checkpoint .*checkpoints/30 is damaged or of another model \(.*\); move it away to go on from step 24, "
        r"or choose another workdir\.$"
    )
    refused(toy_run, run, sentence)
    (run / "checkpoints" / "30").rename(run.parent / "away")
    toy_run(run)


def test_every_flipped_bit_changes_the_checksums():
    state = {"a": np.zeros((3, 4), np.float32), "b": np.arange(5, dtype=np.int32)}
    before = np.asarray(checksums(state))
    for name, array in state.items():
        for place in range(array.size):
            for bit in range(32):
                flipped = array.copy()
                flipped.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
                assert (np.asarray(checksums({**state, name: flipped})) != before).any()


def test_a_checkpoint_with_other_numbers(toy_run, run, monkeypatch):
    monkeypatch.setattr("experiments.common.checkpoints.checksums", lambda state: checksums(state) + 1)
    refused(
        toy_run, run, r"checkpoints/30 is damaged or of another model \(its numbers are not those that were saved\)"
    )


def test_a_checkpoint_of_another_model(toy_run, run):
    shutil.rmtree(run / "checkpoints")
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(5, {"weights": jnp.ones(3)})
    refused(toy_run, run, r"checkpoints/5 is damaged or of another model \(.*\); move it away to start again, or")


def test_a_checkpoint_under_the_number_of_another(toy_run, run):
    shutil.rmtree(run / "checkpoints" / "30")
    (run / "checkpoints" / "24").rename(run / "checkpoints" / "30")
    refused(toy_run, run, r"checkpoints/30 is damaged or of another model \(it is that of step 24\); move it away")


def test_a_file_where_the_checkpoints_should_be(toy_run, run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("precious")
    refused(toy_run, run, r"^a checkpoint could not be written to .*checkpoints \(.*File exists.*\)\.$")


@pytest.mark.parametrize("lines", [0, 5])
def test_rows_of_steps_that_the_checkpoint_has_are_not_lost_silently(toy_run, run, lines):
    content = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(content[:lines]))
    refused(toy_run, run, r"^.*metrics\.jsonl must have the rows until step 30, where the run goes on, and they")


def test_a_torn_last_line_is_measured_again(finished, toy_run, run):
    shutil.rmtree(run / "checkpoints" / "30")
    cut(run / "metrics.jsonl")
    content = (run / "metrics.jsonl").read_bytes()
    assert not content.endswith(b"\n")
    last = json.loads(content.splitlines()[-2])["step"]
    assert [row["step"] for row in Metrics(run / "metrics.jsonl", last).rows][-1] == last < 24
    (run / "metrics.jsonl").write_bytes((finished[0] / "metrics.jsonl").read_bytes()[:-40])
    toy_run(run)
    assert rows_of(run) == rows_of(finished[0])


def test_a_line_that_is_no_row(toy_run, run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], b"hello\n", *lines[1:]]))
    refused(
        toy_run, run, r"^line 2 of .*metrics\.jsonl is no row of metrics; mend or remove it, or take a new workdir\.$"
    )


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_lines_survive_a_failing_write(tmp_path, monkeypatch, failure):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.add({"step": 1})

    def fail(descriptor):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(failure)):
        metrics.add({"step": 2})
    assert contents(tmp_path) == {"metrics.jsonl": b'{"step": 1}\n'}


def test_rows_after_the_checkpoint_are_dropped_in_one_move(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        metrics.add({"step": step})
    before = contents(tmp_path)

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        Metrics(tmp_path / "metrics.jsonl", 2)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert [row["step"] for row in Metrics(tmp_path / "metrics.jsonl", 2).rows] == [1, 2]


def test_a_checkpoint_that_cannot_be_written(toy_run, tmp_path, monkeypatch):
    def full(self, *arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [detail]\nmore")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(RunError, match=r"^a checkpoint could not be written to .*checkpoints \(.*No space left.*\)\.$"):
        toy_run(tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_disk_on_which_files_cannot_grow(finished, toy_process, toy_run, tmp_path, size):
    """Stands for a full one: a sentence in the end, no lost line, and the run goes on where there is room again."""
    limited = ["bash", "-c", f'ulimit -f {size}; exec "$@"', "bash"]  # KiB
    process = toy_process(tmp_path / "run", prefix=limited, JAX_ENABLE_COMPILATION_CACHE="false")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert re.search(r"^error: .*File too large", output, re.MULTILINE), output
    rows = rows_of(tmp_path / "run")
    assert rows == rows_of(finished[0])[: len(rows)]
    toy_run(tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(finished[0])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", -1, r"from 0 to 2\*\*32 - 1"),
        ("steps", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("log_every", 0, "at least 1"),
        ("evaluate_every", -2, "at least 1"),
        ("checkpoint_every", 0, "at least 1"),
        ("checkpoint_every", 7, "a multiple of log_every = 3"),
        ("learning_rate", -0.1, "at least 0 and finite"),
        ("kernel_learning_rate", float("nan"), "at least 0 and finite"),
        ("weight_decay", float("inf"), "at least 0 and finite"),
        ("warmup_steps", 30, "from 0 to below the 30 steps of the schedule"),
        ("decay_steps", 0, "at least 1"),
    ],
)
def test_options_say_what_they_expect(name, value, expected):
    with pytest.raises(ValueError, match=rf"^{name} must be {expected}; got {value}\.$"):
        Toy(**{name: value})


def run_command(monkeypatch, *arguments, recipes=RECIPES, finish=None):
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    command.main(recipes, "python -m toy", finish)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], r"task must be given; there are toy \(default, wide\); other \(default\)\."),
        (["--task", "tyo"], r"unknown task tyo: did you mean toy\?"),
        (["--task", "language"], r"unknown task language: there are toy, other\."),
        (["--task", "toy", "--preset", "wiid"], r"unknown preset wiid: did you mean wide\?"),
        (["--task", "toy", "--steps", "0"], r"steps must be at least 1; got 0\."),
        (
            ["--task", "toy", "--distributed.process-id", "0"],
            r"distributed\.coordinator must be given with .*; got None\.",
        ),
        (
            ["--task", "toy", "--distributed.coordinator", "a:1"],
            r"workdir must be given in a run of several processes.*",
        ),
    ],
)
def test_commands_that_are_wrong(monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=rf"^error: {sentence}$") as caught:
        run_command(monkeypatch, *arguments)
    assert isinstance(caught.value.code, str)  # printed as it is, with an exit status of 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("no number."), IndexError("no port"), RuntimeError("no port\nthere")])
def test_processes_that_cannot_be_joined(monkeypatch, tmp_path, error):
    def fail(*arguments):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax.distributed.initialize", fail)
    expected = r"^error: distributed\.coordinator must be the host:port .*; got a, None and None \(no \w+\)\.$"
    with pytest.raises(SystemExit, match=expected):
        run_command(monkeypatch, "--task", "toy", "--workdir", "w", "--distributed.coordinator", "a")
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_is_not_there(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, "--task", "toy", "--learning-rat", "1")
    assert caught.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RunError("no."), "^error: no.$"),
        (FloatingPointError("nan."), "^error: nan.$"),
        (NotImplementedError("not here."), "^error: not here.$"),
        (OSError(28, "No space left on device", "x"), "^error: .*No space left.* What was measured so far is in .*w.$"),
        (KeyboardInterrupt(), r"^interrupted\. The same command with --workdir w goes on\.$"),
    ],
)
def test_what_ends_a_run_is_one_sentence(monkeypatch, error, sentence):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(command, "train", fail)
    with pytest.raises(SystemExit, match=sentence):
        run_command(monkeypatch, "--task", "toy", "--workdir", "w")


def test_commands_choose_and_change_recipes(monkeypatch, tmp_path):
    calls, ends = [], []
    result = train.Result(None, [{"step": 1, "epoch": 1.0, "split": "train", "loss": 2.0}])

    def pretend(recipe, folder, **options):
        calls.append((recipe, folder, options))
        folder.mkdir(parents=True)
        return result

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "train", pretend)
    run_command(
        monkeypatch, "--task", "toy", "--preset", "wide", "--steps", "9", finish=lambda *all_: ends.append(all_)
    )
    run_command(monkeypatch, "--workdir", "w", "--profile-steps", "1", "2", recipes={"toy": RECIPES["toy"]})
    (recipe, folder, _), (other, chosen, options) = calls
    assert recipe == Toy(features=16, steps=9)
    assert folder.parent == Path("reports/toy")
    assert ends == [(recipe, result, folder)]
    assert (folder / "learning_curves.png").exists()
    assert (other, chosen, options["profile_steps"]) == (Toy(), Path("w"), (1, 2))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "toy (default, wide)"),
        (["--task", "toy", "--help"], "Finds the peak"),
        (
            ["--task", "toy", "--preset", "wide", "--help"],
            "Presets: default, wide. The defaults below are those of wide.",
        ),
    ],
)
def test_help(monkeypatch, capsys, arguments, shown):
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, *arguments)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert shown in text
    if "--task" in arguments:
        for name in Toy.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in text


def test_importing_asks_no_device():
    import subprocess

    code = "import experiments.common.command, jax; assert not jax._src.xla_bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(train.__file__).parents[2])


def test_a_run_that_ended_before_it_could_say_what_it_is_starts_again(toy_run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / ".run.json.partial").write_text('{"recipe": ')
    assert toy_run(tmp_path)[0].rows
    (tmp_path / "run.json").unlink()
    refused(toy_run, tmp_path, r"got .*, which holds checkpoints and no run\.json")


def test_where_something_is_may_change(toy_run, run, monkeypatch):
    monkeypatch.setattr(Toy, "whereabouts", ("features",))
    described = json.loads((run / "run.json").read_text())
    described["recipe"]["features"] = 17
    (run / "run.json").write_text(json.dumps(described))
    before = rows_of(run)
    assert len(toy_run(run)[0].rows) == len(before)
    assert rows_of(run) == before


def test_a_recipe_that_does_not_compile_leaves_the_folder_to_another(toy_run, tmp_path):
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        toy_run(tmp_path / "run", Toy(implementation="mosaic_gpu"))
    assert toy_run(tmp_path / "run")[0].rows
