"""Quality and speed of several models in one table, and the step times of the paper's recipes."""

import dataclasses
import json
import subprocess
import sys

import pytest

from experiments.lra import compare
from experiments.lra.listops.recipe import SMOKE
from experiments.lra.step_times import __main__ as step_times
from experiments.lra.step_times import measure, table
from experiments.lra.step_times.cases import cases
from experiments.report.runs import read
from pallas_kernels.timing import Effort
from tests.experiments.conftest import ROOT
from tests.experiments.test_report import ROWS, workdir


def test_baselines_have_learning_rates_of_their_own_and_nothing_else():
    recipe = dataclasses.replace(SMOKE, kernel_learning_rate=None)
    found = compare.variants(recipe, ("long_conv", "transformer", "s4d", "s5"))
    assert found["long_conv"] == recipe
    assert found["transformer"] == dataclasses.replace(recipe, architecture="transformer", learning_rate=0.001)
    for name in ("s4d", "s5"):
        assert found[name] == dataclasses.replace(recipe, architecture=name, kernel_learning_rate=0.001)
    slow = dataclasses.replace(SMOKE, learning_rate=1e-4, kernel_learning_rate=1e-5)
    rates = [
        (one.learning_rate, one.kernel_learning_rate) for one in compare.variants(slow, ("transformer", "s5")).values()
    ]
    assert rates == [(1e-4, 1e-5)] * 2


def run_compare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare", "--task", "listops", "--preset", "smoke", *map(str, arguments)])
    compare.main()


def test_a_comparison_is_one_table(tmp_path, monkeypatch, capsys):
    def train_all(recipes, folder, console):
        rates = {"learning_rate": 0.01, "kernel_learning_rate": None}
        for name in recipes:
            faster = [row | {"timing": dict(row["timing"])} for row in ROWS]
            for row in faster:
                if "examples_per_second" in row["timing"] and name == "long_conv":
                    row["timing"]["examples_per_second"] *= 3
            workdir(folder / name, rows=faster[:3] if name == "s5" else faster, **rates)
        return {"s5": "the training loss is nan at step 3"}

    monkeypatch.setattr(compare, "train_all", train_all)
    run_compare(monkeypatch, "--models", "long_conv", "transformer", "s5", "--workdir", tmp_path)
    rows = {row["model"]: row for row in json.loads((tmp_path / "comparison.json").read_text())["rows"]}
    assert list(rows) == ["long_conv", "transformer", "s5"]
    assert rows["long_conv"]["speed_over_transformer"] == pytest.approx(3)
    assert rows["long_conv"]["test_accuracy"] == 0.4321
    assert (rows["s5"]["finished"], rows["s5"]["failed"]) == (False, "the training loss is nan at step 3")
    page = (tmp_path / "comparison.md").read_text()
    assert "| long_conv | 50.00% | 43.21% | 129.0 | 3.00 | 1,234 | not measured | 0.01, 0.01 |" in page
    assert "| s5, the training loss is nan at step 3 |" in page
    assert "43.21%" in capsys.readouterr().out


def test_a_task_without_a_validation_split_has_no_column_for_it(tmp_path):
    rates = {"learning_rate": 0.01, "kernel_learning_rate": None}
    workdir(tmp_path / "s5", rows=[row for row in ROWS if row["split"] != "validation"], **rates)
    rows = compare.compared({"s5": read(tmp_path / "s5")}, {})
    assert compare.header(rows[0])[:3] == ["model", "test accuracy", "examples/s"]
    assert compare.cells(rows[0])[:2] == ["s5", "90.00%"]  # that of the last step


def test_a_model_that_no_step_can_be_compiled_for_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "train_all", lambda recipes, folder, console: {"s5": "the kernel runs on GPUs alone"})
    with pytest.raises(SystemExit, match=r"^error: s5 cannot be trained: the kernel runs on GPUs alone"):
        run_compare(monkeypatch, "--models", "s5", "--workdir", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--sweep", "regularization"),
            "sweep must not be given to a comparison; got regularization. A sweep is a command",
        ),
        (("--profile-steps", "1", "2"), r"profile_steps must not be given to a comparison; got \(1, 2\). To profile"),
        (
            ("--distributed.coordinator", "a:1", "--distributed.num-processes", "2", "--distributed.process-id", "0"),
            (
                "distributed.coordinator must not be given to a comparison; got a:1. A comparison is of one process "
                "and all of its devices; for more, train the models one by one with the train command of the task.$"
            ),
        ),
        (("--distributed.process-id", "0"), "distributed.process_id must not be given to a comparison; got 0"),
        (("--preset", "huge"), "unknown preset huge"),
    ],
)
def test_comparisons_that_cannot_be(tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run_compare(monkeypatch, *arguments, "--workdir", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_all_models_train(tmp_path, monkeypatch, capsys):
    small = (
        "--steps",
        "2",
        "--evaluate-every",
        "2",
        "--checkpoint-every",
        "2",
        "--warmup-steps",
        "0",
        "--batch-size",
        "8",
    )
    run_compare(monkeypatch, *small, "--workdir", tmp_path)
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["long_conv", "transformer", "s4d", "s5"]
    assert all(row["finished"] and row["parameters"] > 1000 and row["examples_per_second"] > 0 for row in rows)
    run_compare(monkeypatch, *small, "--workdir", tmp_path)
    assert capsys.readouterr().out.count("finished before") == 4


def test_cases_are_the_paper_presets():
    from experiments.lra.train import RECIPES

    for task, case in cases().items():
        if task in RECIPES:
            assert case.recipe == RECIPES[task]["paper"]
        batch = case.tiny().batch()
        assert batch["inputs"].shape[0] == 2
    assert cases()["path256"].length == 65_536
    assert cases()["retrieval"].batch()["inputs"].shape[1:] == (2, 4000)


def test_a_step_is_timed_and_what_cannot_run_says_why():
    case, effort = cases()["image"].tiny(), Effort(repeats=3, round_seconds=0.001, limit_seconds=0.1)
    timed = measure.measure("image", case, measure.VARIANTS[0], effort)
    assert timed.status == "measured", timed.reason
    assert timed.ms_quartiles[0] <= timed.ms <= timed.ms_quartiles[1]
    assert timed.epoch_hours == pytest.approx(22_500 * timed.ms / 3.6e6)
    kernel = measure.measure("image", case, measure.VARIANTS[1], effort)
    assert (kernel.status, kernel.ms) == ("unsupported", None)
    assert "mosaic_gpu" in kernel.reason
    long = measure.measure("path256", cases()["path256"], measure.VARIANTS[4], effort)
    assert long.reason.startswith("not tried: matrices of 65,536")


ABOUT = {"device": "abacus", "platform": "cpu", "versions": {"jax": "0"}, "tiny": True}


def row_of(task, number, ms):
    variant = measure.VARIANTS[number]
    reason = None if ms else "no memory"
    status = "measured" if ms else "failed"
    times = {"ms": ms, "examples_per_second": 1.0, "epoch_hours": 2.0, "step_bytes": 10**9} if ms else {}
    return measure.Row(task, *dataclasses.astuple(variant), status, 2, 64, reason, **times)


def test_ratios_are_those_of_the_fastest_long_convolutions():
    rows = [row_of("text", 0, 4.0), row_of("text", 3, 2.0), row_of("text", 4, 8.0), row_of("image", 0, 3.0)]
    rows += [row_of("image", 4, 3.0), row_of("image", 6, None)]
    page = table.markdown(ABOUT, rows)
    assert "| text | a Transformer, `xla`, float32 | 4.00 |" in page
    assert "| **geometric mean of 2 of the arena's tasks** | a Transformer, `xla`, float32 | **2.00** |" in page
    assert "- image/transformer/cudnn/bfloat16: no memory" in page
    assert "FlashButterfly: 7 [A]" in page
    assert "the times mean nothing" in page


def test_what_was_measured_is_kept_and_never_mixed(tmp_path):
    file = tmp_path / "step_times.json"
    file.write_text(json.dumps({**ABOUT, "rows": [row_of("text", 0, 4.0).as_json()]}))
    assert [row.key for row in step_times.read(file, ABOUT)] == [("text", "long_conv", "xla", "float32")]
    with pytest.raises(ValueError, match=r"is of .*abacus.*, and this is .*; choose another --out"):
        step_times.read(file, ABOUT | {"device": "slide rule"})
    file.write_text("{")
    with pytest.raises(ValueError, match="holds no step times"):
        step_times.read(file, ABOUT)


def test_recipes_can_be_read_without_the_libraries_of_data():
    program = """
import importlib.util, sys
real = importlib.util.find_spec
hidden = ("grain", "sklearn", "PIL", "tensorflow_datasets", "orbax", "tyro", "matplotlib")
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden and not installed:
            raise ModuleNotFoundError(name)
installed = False
sys.meta_path.insert(0, Hide())
importlib.util.find_spec = lambda name, *rest: None if name in hidden else real(name, *rest)
from experiments.lra.step_times import stand_ins
assert set(stand_ins.install()) == set(hidden)
installed = True
sys.meta_path.insert(0, sys.meta_path.pop())
from experiments.lra.step_times.cases import cases
from experiments.report.runs import read
assert cases()["path256"].recipe.features == 256
import grain
assert "site-packages" not in str(grain.__spec__.origin)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
