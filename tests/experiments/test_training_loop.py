"""The training loop: what a run computes and leaves behind does not depend on interruptions, devices or processes."""

import contextlib
import json
import os
import re
import signal
import socket
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.common import data, memory
from experiments.common import train as loop
from tests.experiments import toy
from tests.experiments.toy import LENGTH, Rows, Toy, rows_of


def test_rows_are_those_of_the_recipe(finished):
    rows = rows_of(finished[0])
    trained = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in trained] == list(range(3, 31, 3))
    evaluated = [(row["step"], row["split"]) for row in rows if row["split"] != "train"]
    assert evaluated == [(step, split) for step in (10, 20, 30) for split in ("validation", "test")]
    measures = {"loss", "accuracy", "gradient_norm", "learning_rate", "kernel_learning_rate"}
    assert all(row.keys() == {"step", "epoch", "split"} | measures for row in trained)
    assert trained[1]["epoch"] == round(6 * 8 / 101, 4)
    for line in (finished[0] / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        names = {"seconds", "examples_per_second", "waiting_for_data"}
        assert row["timing"].keys() == (names if row["split"] == "train" else {"seconds"})


def test_what_the_program_needs_is_written(finished):
    start = json.loads((finished[0] / "run.json").read_text())["starts"][0]
    assert start["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(finished[1].state.params))
    assert start["step_bytes"] > 12 * start["parameters"]  # they and the two moments of Adam


def test_memory_where_the_device_tells_none(monkeypatch):
    class Silent:
        def memory_stats(self):
            return None

        def memory_analysis(self):
            return None

    assert memory.step_bytes(Silent()) is None
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [Silent()])
    assert memory.peak_bytes() is None


def test_it_learns(finished):
    losses = [row["loss"] for row in rows_of(finished[0]) if row["split"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


def test_learning_rates_are_those_of_the_optimizer(finished):
    rates = {row["step"]: row["learning_rate"] for row in rows_of(finished[0]) if row["split"] == "train"}
    assert rates[3] == pytest.approx(0.05 * 2 / 4)  # the third update is number 2 of a warm-up of 4
    assert rates[30] == pytest.approx(0.05 * (1 + np.cos(np.pi * 25 / 26)) / 2, rel=1e-4)


def test_evaluation_is_the_mean_over_every_example_once(finished):
    folder, result, _ = finished
    task = Toy().build()
    for split, rows in (("validation", Rows(21, 2)), ("test", Rows(19, 3))):
        everything = {"inputs": rows.inputs, "labels": rows.labels, "lengths": rows.lengths}
        variables = {"params": result.state.params, **result.state.statistics}
        outputs = task.model.apply(variables, everything, True, method=task.forward)
        logged = [row for row in rows_of(folder) if row["split"] == split][-1]
        for name, (total, weight) in task.measure(outputs, everything).items():
            # measured difference 6e-8
            assert logged[name] == pytest.approx(float(total.sum() / weight.sum()), rel=2e-6)


def test_every_variable_learns(finished):
    before = jax.jit(loop.make_initialization(Toy(), Toy().build()))()
    after = finished[1].state
    same = jax.tree.map(lambda old, new: bool((old == new).all()), before[:3], after[:3])
    assert not any(jax.tree.leaves(same)), same
    assert int(after.step) == 30


def test_output_off_a_terminal_is_plain_lines(finished):
    output = finished[2]
    assert "\x1b" not in output
    assert "\r" not in output
    assert re.match(r"step 10/30   epoch 0\.79   train loss \d\.\d+   validation loss ", output)
    assert re.search(r"test accuracy .*after step \d+, where validation was best", output)


def test_a_finished_run_has_nothing_left_to_do(finished, toy_run):
    before = rows_of(finished[0])
    result, output = toy_run(finished[0])
    assert "going on from step 30" in output
    assert rows_of(finished[0]) == before
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), result.state, finished[1].state))


def test_the_step_is_compiled_once(toy_run, tmp_path):
    toy.TRACES.clear()
    toy_run(tmp_path / "run", terminal=True)
    # Training once; not training, the initialisation and the evaluation of both splits.
    assert (toy.TRACES.count(False), toy.TRACES.count(True)) == (1, 2)


def step_on(devices: int, recipe: Toy):
    """The mesh, the jitted step, its evaluation, and a state and a batch for them."""
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    replicated, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    task = recipe.build()
    state = jax.jit(loop.make_initialization(recipe, task), out_shardings=replicated)()
    batch = data.training_batches(task.train, recipe.batch_size, by_rows)[0]
    return loop.make_train_step(recipe, task, replicated), loop.make_evaluation_step(task, replicated), state, batch


@pytest.mark.parametrize("norm", ["batch", pytest.param("layer", marks=pytest.mark.slow)])
def test_devices_exchange_nothing_but_sums(compiled, norm):
    train_step, evaluation_step, state, batch = step_on(8, Toy(norm=norm))
    weights = jax.device_put(jnp.ones(8), batch["labels"].sharding)
    assert batch["inputs"].sharding.shard_shape(batch["inputs"].shape) == (1, LENGTH, 1)
    for program in (
        train_step.lower(state, batch),
        evaluation_step.lower(state.params, state.statistics, data.EvaluationBatch(batch, weights)),
    ):
        operations = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
        assert set(re.findall(rf" ({operations})(?:-start)?\(", program.compile().as_text())) == {"all-reduce"}


def test_the_state_is_donated(compiled):
    train_step, _, state, batch = step_on(1, Toy())
    train_step(state, batch)
    assert all(array.is_deleted() for array in jax.tree.leaves(state))
    assert not batch["inputs"].is_deleted()


@pytest.mark.parametrize(
    "devices", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8]
)
def test_numbers_of_devices_agree(finished, toy_run, tmp_path, devices):
    toy_run(tmp_path / "run", devices=devices)
    assert_close(rows_of(tmp_path / "run"), rows_of(finished[0]))


def assert_close(rows, expected):
    """Within what the order of additions makes of 30 steps. Measured: 2 devices or processes 1.2e-6, 4 and 8 1.7e-6."""
    for row, other in zip(rows, expected, strict=True):
        numbers = {name for name, value in other.items() if isinstance(value, float)}
        assert {**row, **{name: other[name] for name in numbers}} == other
        difference = max(abs(row[name] - other[name]) / max(1.0, abs(other[name])) for name in numbers)
        assert difference < 1e-5, (row, other)


@pytest.mark.slow
def test_two_processes_agree_with_one(finished, toy_process, tmp_path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"localhost:{listener.getsockname()[1]}"
    options = ["--distributed.coordinator", coordinator, "--distributed.num-processes", "2", "--distributed.process-id"]
    processes = [toy_process(tmp_path / "run", *options, str(number)) for number in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "validation loss" in outputs[0]
    assert "validation loss" not in outputs[1]
    assert_close(rows_of(tmp_path / "run"), rows_of(finished[0]))
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (described["starts"][0]["process_count"], described["starts"][0]["device_count"]) == (2, 2)


@pytest.mark.slow
def test_a_process_of_several_can_be_asked_to_end(toy_process, tmp_path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"localhost:{listener.getsockname()[1]}"
    options = ["--distributed.coordinator", coordinator, "--distributed.num-processes", "1"]
    options += ["--distributed.process-id", "0", "--steps", "1000000"]
    with toy_process(tmp_path / "run", *options) as process:
        try:
            deadline = time.monotonic() + 100
            while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            process.terminate()
            assert process.wait(30) == -signal.SIGTERM
        finally:
            process.kill()


def test_each_process_reads_its_own_rows_alone(monkeypatch):
    read = []

    class Numbers:
        def __len__(self):
            return 10

        def __getitem__(self, row):
            read.append(row)
            return np.int32(row)

    monkeypatch.setattr(data, "to_devices", lambda batch, sharding: batch)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    examples = grain.MapDataset.source(Numbers())
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        read.clear()
        batches = data.training_batches(examples, 4, None)
        assert batches[0].tolist() == read == [[0, 1], [2, 3]][process]
        assert batches[2].tolist() == [[8, 9], [0, 1]][process]
        last = data.evaluation_batches(examples, 4, None)[2]
        assert (last.examples.tolist(), last.weight.tolist()) == [([8, 9], [1, 1]), ([9, 9], [0, 0])][process]


@pytest.mark.parametrize("steps", [(2, 11, 13, 23), pytest.param((1, 6, 7, 12, 20, 21, 30), marks=pytest.mark.slow)])
def test_interrupted_runs_go_on_to_the_bit(finished, toy_run, tmp_path, monkeypatch, steps):
    """Before and after checkpoints, every 6 steps, and evaluations, every 10, whose rows are then measured again."""
    add = loop.Log.add
    for stop in steps:

        def interrupt(self, step, measures, stop=stop):
            if step == stop:
                raise KeyboardInterrupt
            add(self, step, measures)

        monkeypatch.setattr(loop.Log, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy_run(tmp_path / "run")
    monkeypatch.undo()
    result, output = toy_run(tmp_path / "run")
    assert "going on from step" in output
    assert rows_of(tmp_path / "run") == rows_of(finished[0])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), result.state, finished[1].state))


@pytest.mark.parametrize(
    ("interrupts", "saved"),
    [
        ({8: 1}, "9"),  # with the next row
        ({12: 1}, "12"),  # one that is saved anyway
        ({8: 2}, "6"),  # the second ends it at once
        ({29: 1}, "30"),  # nothing is left to interrupt
    ],
)
def test_ctrl_c_saves_and_ends_and_the_run_goes_on(finished, toy_run, tmp_path, monkeypatch, interrupts, saved):
    add, folder = loop.Log.add, tmp_path / "run"

    def press(self, step, measures):
        add(self, step, measures)
        for _ in range(interrupts.get(step, 0)):
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(loop.Log, "add", press)
        with contextlib.nullcontext() if saved == "30" else pytest.raises(KeyboardInterrupt):
            toy_run(folder)
    assert signal.getsignal(signal.SIGINT) == handler
    assert max(checkpoint_files(folder), key=int) == saved
    result, _ = toy_run(folder)
    assert rows_of(folder) == rows_of(finished[0])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), result.state, finished[1].state))


def test_ctrl_c_says_what_happens(toy_process, tmp_path):
    process = toy_process(tmp_path / "run")
    while count_lines(tmp_path / "run") < 1 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode in (0, 1), output  # 0: the run was faster
    if process.returncode:
        step = re.search(r"interrupted: saves step (\d+) and ends; Ctrl-C again to end now", output)
        assert step, output
        assert step[1] in checkpoint_files(tmp_path / "run")
        assert "The same command with --workdir" in output
        assert "Traceback" not in output


@pytest.mark.parametrize(("seed", "kills"), [(0, 1), pytest.param(1, 12, marks=pytest.mark.slow)])
def test_killed_runs_go_on_to_the_bit(finished, toy_run, toy_process, tmp_path, seed, kills):
    """Killed at random, a few milliseconds after a random line or in the middle of writing a checkpoint."""
    rng = np.random.default_rng(seed)
    folder = tmp_path / "run"
    for number in range(kills):
        process = toy_process(folder)
        lines = count_lines(folder) + rng.integers(0, 6)
        in_a_save = number % 2 == 0
        before = set(checkpoint_files(folder))
        while process.poll() is None and not (
            count_lines(folder) > lines and (not in_a_save or set(checkpoint_files(folder)) - before)
        ):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        output, _ = process.communicate()
        # A run that goes on from near its end may be faster than the kill.
        assert process.returncode in ((0, -signal.SIGKILL) if number else (-signal.SIGKILL,)), output
    toy_run(folder)
    assert rows_of(folder) == rows_of(finished[0])


def count_lines(folder) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def checkpoint_files(folder) -> list:
    return [path.name for path in (folder / "checkpoints").glob("*")]


def test_a_loss_that_is_not_finite_ends_the_run(toy_run, tmp_path, monkeypatch):
    """By a row that is not a number, which comes first in step 10."""
    bad = grain.MapDataset.range(101).seed(0).shuffle()[9 * 8 + 3]
    monkeypatch.setattr(toy, "BAD_ROW", bad)
    rates = r"learning_rate = [\d.e-]+, kernel_learning_rate = [\d.e-]+"
    sentence = (
        rf"^the training (loss|gradient_norm) is nan at step 10 with {rates}, where a finite number was expected; .*"
        r"The metrics until then are in .*metrics\.jsonl, the last checkpoint is that of step 6\.$"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        toy_run(tmp_path / "run")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [3, 6, 9]
    assert checkpoint_files(tmp_path / "run") == ["6"]


def test_profile_is_written(toy_run, tmp_path):
    toy_run(tmp_path / "run", profile_steps=(3, 4))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_what_goes_wrong_in_the_data_reaches_the_user(toy_run, tmp_path, monkeypatch):
    def gone(self, row):
        raise OSError(5, "Input/output error", "rows")

    first = Rows.__getitem__
    monkeypatch.setattr(Rows, "__getitem__", lambda self, row: first(self, row) if row < 90 else gone(self, row))
    with pytest.raises(OSError, match="Input/output error"):
        toy_run(tmp_path / "run")
