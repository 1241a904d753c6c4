"""Every smoke preset trains, evaluates, and goes on to the bit from a checkpoint; slow ones are killed for it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.common import train as loop
from experiments.common.errors import RunError
from experiments.common.workdir import Workdir
from experiments.digits.train import RECIPES as DIGITS
from experiments.fmri.train import RECIPES as FMRI
from experiments.images.train import RECIPES as IMAGES
from experiments.language.train import RECIPES as LANGUAGE
from experiments.lra.train import RECIPES as LRA
from tests.experiments.conftest import ROOT
from tests.experiments.toy import rows_of

FAMILIES = {"lra": LRA, "images": IMAGES, "fmri": FMRI}
TASKS = [(family, task) for family, tasks in FAMILIES.items() for task in tasks]


@pytest.mark.parametrize(
    ("family", "task"),  # Path-X's preset is Path256's in float32
    [pytest.param(*one, marks=[pytest.mark.slow] * (one == ("lra", "pathx")), id="-".join(one)) for one in TASKS],
)
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(toy_run, tmp_path, family, task):
    """What is behind the checkpoint is lost, as when a run is killed; `test_training_loop` kills."""
    recipe = FAMILIES[family][task]["smoke"]
    expected, _ = toy_run(tmp_path / "undisturbed", recipe)
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    result, output = toy_run(tmp_path / "run", recipe)
    assert "going on from step 4" in output
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "undisturbed")
    assert jax.tree.all(jax.tree.map(np.array_equal, result.state, expected.state))
    evaluated = [row for row in rows_of(tmp_path / "run") if row["split"] != "train"]
    assert {row["step"] for row in evaluated} == {3, 6}
    assert all(np.isfinite(row["loss"]) for row in evaluated)
    if task == "listops":  # ten rows of both splits exactly, though batches have four
        assert [row["split"] for row in evaluated] == ["validation", "test"] * 2
        assert all(row["accuracy"] * 10 == pytest.approx(round(row["accuracy"] * 10), abs=1e-5) for row in evaluated)
    assert_all_learn(recipe, expected.state)


def assert_all_learn(recipe, state):
    """No parameter stays where it started, and the model has no other."""
    before = jax.jit(loop.make_initialization(recipe, recipe.build()))()
    same = jax.tree.map(np.array_equal, before.params, state.params)
    assert not any(jax.tree.leaves(same)), same


TABLES = (LRA, IMAGES, FMRI, LANGUAGE, DIGITS)
BY_KIND = {type(one).__name__: one for table in TABLES for presets in table.values() for one in presets.values()}


@pytest.mark.parametrize("recipe", BY_KIND.values(), ids=BY_KIND)
def test_a_run_may_go_on_with_its_state_divided_otherwise(tmp_path, recipe):
    Workdir(tmp_path, recipe).describe(0, {})
    Workdir(tmp_path, replace(recipe, state_sharding="sharded"))
    with pytest.raises(RunError, match="another recipe"):
        Workdir(tmp_path, replace(recipe, seed=recipe.seed + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), TASKS)
def test_a_killed_command_goes_on_to_the_bit(toy_run, compiled, tmp_path, family, task):
    """As a user has it: the command, SIGKILL behind the first checkpoint, and the same command again."""
    command = [sys.executable, "-W", "error", "-m", f"experiments.{family}.train", "--task", task, "--preset", "smoke"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | {name.upper(): str(value) for name, value in compiled.items()}

    def start(folder):
        return subprocess.Popen([*command, "--workdir", str(folder)], cwd=ROOT, env=environment, stdout=subprocess.PIPE)

    toy_run(tmp_path / "undisturbed", FAMILIES[family][task]["smoke"])
    killed = start(tmp_path / "run")
    while killed.poll() is None and not (tmp_path / "run" / "checkpoints" / "2").exists():
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    again = start(tmp_path / "run")
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "undisturbed")
