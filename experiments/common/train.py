"""The training loop of every task: `train`, in the order in which things happen, with its parts below it.

All processes of a run execute it alike; process 0 alone writes and prints. What a step computes depends on the recipe
and on the number of the step, never on when the run was killed and started again.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from experiments.common.checkpoints import Checkpoints
from experiments.common.data import EvaluationBatch, evaluation_batches, reading_ahead, training_batches
from experiments.common.errors import RunError
from experiments.common.initialization import quickly_compiled_random_bits
from experiments.common.interrupts import Interrupts
from experiments.common.memory import peak_bytes, step_bytes
from experiments.common.report import evaluation_line, progress_bar, result_table, training_line
from experiments.common.sharding import state_shardings
from experiments.common.task import Batch, Measure, Recipe, Task
from experiments.common.throughput import throughput
from experiments.common.workdir import Metrics, Row, Workdir

IN_FLIGHT = 4  # steps that the devices may be behind the host; then the host waits for them, and never they for it
SECONDS_BETWEEN_LINES = 30.0  # where nobody watches a progress bar


class State(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array
    """int32 (): steps done."""

    params: Any
    statistics: Any
    """The collections of variables besides `params`: `batch_stats`, or nothing."""

    optimizer: optax.OptState


class Result(NamedTuple):
    """What a run leaves in memory."""

    state: State
    rows: list[Row]
    """Those of metrics.jsonl."""


def train(
    recipe: Recipe,
    folder: Path,
    *,
    profile_steps: tuple[int, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    console: Console | None = None,
) -> Result:
    """Starts a run in a folder, or goes on with the one that is there from its latest checkpoint.

    Ctrl-C saves the next step with a row of metrics, and ends; a second one ends at once.

    Args:
      recipe: what to train, and how.
      folder: for run.json, metrics.jsonl, checkpoints and the profile.
      profile_steps: the first and the last step of a trace for TensorBoard or Perfetto.
      devices: over which each batch is divided; all that there are, unless told otherwise.
      console: for progress and results.

    Raises:
      RunError: if the run is asked for wrongly, or the folder is not what it should be.
      FloatingPointError: as soon as something measured is not finite.
      KeyboardInterrupt: on Ctrl-C.
      OSError: if the metrics cannot be written.
    """
    console = Console() if console is None else console
    console.quiet |= jax.process_index() != 0

    # Devices and the folder: what is wrong with them is said before anything takes time.
    devices = jax.devices() if devices is None else devices
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    replicated, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    check_divisible(recipe.batch_size, recipe.accumulation, mesh)
    workdir = Workdir(folder, recipe)

    # Data.
    try:
        task = recipe.build()
    except ValueError as error:
        raise RunError(str(error)) from error
    batches = training_batches(task.train, recipe.batch_size, by_rows)
    splits = {
        name: evaluation_batches(examples, recipe.batch_size, by_rows) for name, examples in task.evaluation.items()
    }

    # State: the latest checkpoint, or the initialisation.
    initialize = make_initialization(recipe, task)
    with quickly_compiled_random_bits():  # as below, or it would be traced twice
        shapes = jax.eval_shape(initialize)
    shardings = state_shardings(shapes, mesh, recipe.state_sharding)
    like = jax.tree.map(abstract, shapes, shardings)
    checkpoints = Checkpoints(workdir.checkpoints)
    first = checkpoints.latest_step()
    check_profile_steps(profile_steps, first, recipe.steps)
    with quickly_compiled_random_bits():
        state = checkpoints.restore(first, like) if first else jax.jit(initialize, out_shardings=shardings)()
    if not first and task.initial:
        state = state._replace(params=jax.device_put({**state.params, **task.initial}, shardings.params))
    if first:
        console.print(f"going on from step {first} in {folder}")

    # Steps, compiled here and once: what is called below cannot compile again.
    start = time.perf_counter()
    with console.status("compiling"):
        divided = shardings if recipe.state_sharding == "sharded" else None
        example_batch = abstract(batches[0], by_rows)
        train_step = make_train_step(recipe, task, replicated, divided).lower(like, example_batch).compile()
        weight = jax.ShapeDtypeStruct((recipe.batch_size,), jnp.float32, sharding=by_rows)
        evaluation_step = make_evaluation_step(task, replicated)
        evaluation_batch = EvaluationBatch(example_batch, weight)
        evaluation_step = evaluation_step.lower(like.params, like.statistics, evaluation_batch).compile()
    compilation = time.perf_counter() - start

    # The files: only now, when nothing can be wrong with the recipe or the checkpoint any more.
    metrics = Metrics(folder / "metrics.jsonl", first)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(like.params))
    workdir.describe(first, {"parameters": parameters, "step_bytes": step_bytes(train_step)})

    # The loop.
    log = Log(recipe, task, metrics, console, devices)
    upcoming_batches = reading_ahead(batches[first : recipe.steps])
    asked_to_end = False
    with checkpoints, progress_bar(console) as progress, upcoming_batches as upcoming, Interrupts() as interrupts:
        bar = progress.add_task("", total=recipe.steps, completed=first, status="")
        for step in range(first + 1, recipe.steps + 1):
            if profile_steps and step == profile_steps[0]:
                jax.profiler.start_trace(folder / "profile")
            with log.waiting_for_data():
                batch = next(upcoming)
            state, measures = train_step(state, batch)
            log.add(step, measures)
            if profile_steps and step == profile_steps[1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            progress.update(bar, advance=1, status=log.status)

            evaluate_now = is_due(step, recipe.evaluate_every, recipe.steps)
            checkpoint_now = is_due(step, recipe.checkpoint_every, recipe.steps)
            if interrupts.heard and not asked_to_end:
                asked_to_end = True
                last = min(step + -step % recipe.log_every, recipe.steps)
                console.print(f"interrupted: saves step {last:,} and ends; Ctrl-C again to end now")
            # With a row, which would tell of fewer steps if the run went on from within them.
            end_now = asked_to_end and is_due(step, recipe.log_every, recipe.steps)
            checkpoint_now |= end_now
            if evaluate_now or checkpoint_now:
                log.catch_up()  # a state that is not finite is neither evaluated nor saved
            if evaluate_now:
                with log.clock_stopped():
                    for name, split in splits.items():
                        log.add_evaluation(step, name, evaluate(evaluation_step, state, split))
                    log.print_evaluation(step)
            if checkpoint_now:
                with log.clock_stopped():
                    checkpoints.save(step, state)
            if end_now and step < recipe.steps:
                raise KeyboardInterrupt

    console.print(result_table(recipe, task, metrics.rows, state.params, folder, compilation))
    return Result(state, metrics.rows)


def check_divisible(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Every device gets as many examples of each part of a batch as every other."""
    multiple = mesh.size * accumulation
    if batch_size % multiple:
        below = batch_size // multiple * multiple
        fitting = " or ".join(str(size) for size in (below, below + multiple) if size)
        parts = f" times accumulation = {accumulation}" if accumulation > 1 else ""
        raise RunError(
            f"batch_size must be a multiple of the {mesh.size} devices{parts}, such as {fitting}; got {batch_size}."
        )


def check_profile_steps(profile_steps: tuple[int, int] | None, first: int, steps: int) -> None:
    """The steps to trace are among those to come."""
    if profile_steps and not first < profile_steps[0] <= profile_steps[1] <= steps:
        raise RunError(
            f"profile_steps must be a first and a last step from {first + 1} to {steps}, those that this run has to "
            f"do; got {profile_steps[0]} {profile_steps[1]}."
        )


def make_initialization(recipe: Recipe, task: Task) -> Callable[[], State]:
    """A function that gives the state before the first step."""
    batch = jax.tree.map(lambda array: np.zeros_like(array)[None], task.train[0])
    optimizer = recipe.optimizer()

    def initialize() -> State:
        key, _ = keys(recipe)
        variables = dict(task.model.init(key, batch, True, method=task.forward))
        params = variables.pop("params")
        return State(jnp.int32(0), params, variables, optimizer.init(params))

    return initialize


def keys(recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Of the initialisation, and of the dropout; that of a step is folded in from its number."""
    initialization, dropout = jax.random.split(jax.random.key(recipe.seed))
    return initialization, dropout


def make_train_step(recipe: Recipe, task: Task, replicated: NamedSharding, shardings: Any = None) -> Any:
    """A jitted function of the state and a batch: the next state, in the memory of the last, and what was measured.

    The batch is sharded over the devices. Where the state is not, the sums over the batch, of the gradient, the
    measures and the statistics of batch normalisation, are all that the devices exchange; where it is, the parameters
    are gathered before.

    Args:
      recipe: which says how.
      task: what is measured.
      replicated: the sharding of what all devices have.
      shardings: of the state; None is replicated.
    """
    optimizer = recipe.optimizer()
    shardings = replicated if shardings is None else shardings

    def sums_of(params: Any, statistics: Any, batch: Batch, dropout: jax.Array) -> tuple[dict[str, Measure], Any]:
        outputs, statistics = task.model.apply(
            {"params": params, **statistics},
            batch,
            False,
            method=task.forward,
            rngs={"dropout": dropout},
            mutable=list(statistics),
        )
        return jax.tree.map(jnp.sum, task.measure(outputs, batch)), dict(statistics)

    def at_once(params: Any, statistics: Any, batch: Batch, dropout: jax.Array) -> Any:
        """The gradient of the mean loss, the means and the new statistics."""

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            sums, new = sums_of(params, statistics, batch, dropout)
            means = {name: total / weight for name, (total, weight) in sums.items()}
            return means["loss"], (means, new)

        gradient, (means, new) = jax.grad(loss_of, has_aux=True)(params)
        return gradient, means, new

    def in_parts(params: Any, statistics: Any, batch: Batch, dropout: jax.Array) -> Any:
        """The same from the parts of the batch: weights of a loss do not depend on the parameters."""

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            number, rows = part

            def loss_of(params: Any) -> tuple[jax.Array, Any]:
                sums, new = sums_of(params, carry[2], rows, jax.random.fold_in(dropout, number))
                return sums["loss"].total, (sums, new)

            gradient, (sums, new) = jax.grad(loss_of, has_aux=True)(params)
            return (*jax.tree.map(jnp.add, carry[:2], (gradient, sums)), new), None

        # Every part has rows of every device: rows stay where they are.
        count = recipe.accumulation
        parts = jax.tree.map(lambda rows: rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1), batch)
        one = jax.tree.map(lambda rows: rows[0], parts)
        sums = jax.eval_shape(lambda: sums_of(params, statistics, one, dropout)[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (params, sums))
        (gradient, sums, new), _ = jax.lax.scan(add, (*zeros, statistics), (jnp.arange(count), parts))
        means = {name: total / weight for name, (total, weight) in sums.items()}
        return jax.tree.map(lambda total: total / sums["loss"].weight, gradient), means, new

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, replicated))
    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        dropout = jax.random.fold_in(keys(recipe)[1], state.step)
        params = state.params
        if shardings is not replicated:
            params = jax.lax.with_sharding_constraint(params, replicated)
        compute = at_once if recipe.accumulation == 1 else in_parts
        gradient, means, statistics = compute(params, state.statistics, batch, dropout)
        if shardings is not replicated:
            gradient = jax.lax.with_sharding_constraint(gradient, shardings.params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        measures = {**means, "gradient_norm": optax.tree.norm(gradient), **recipe.learning_rates(state.step)}
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, statistics, optimizer_state), measures

    return train_step


def make_evaluation_step(task: Task, replicated: NamedSharding) -> Any:
    """A jitted function of the parameters, the statistics and a batch: the sums of totals and of weights."""

    @partial(jax.jit, out_shardings=replicated)
    def evaluation_step(params: Any, statistics: Any, batch: EvaluationBatch) -> dict[str, Measure]:
        outputs = task.model.apply({"params": params, **statistics}, batch.examples, True, method=task.forward)
        measured = task.measure(outputs, batch.examples)
        # where, not a product: what padding measures may be infinite.
        return jax.tree.map(lambda values: jnp.where(batch.weight > 0, values, 0).sum(), measured)

    return evaluation_step


def evaluate(evaluation_step: Any, state: State, split: grain.MapDataset) -> dict[str, float]:
    """The means over a split."""
    sums: dict[str, np.ndarray] = {}
    with reading_ahead(split) as batches:
        for measured in fetched_late(evaluation_step(state.params, state.statistics, batch) for batch in batches):
            for name, pair in measured.items():
                sums[name] = sums.get(name, 0.0) + np.array(pair, np.float64)
    return {name: float(total / weight) for name, (total, weight) in sums.items()}


def fetched_late(values: Iterable[Any]) -> Iterator[Any]:
    """What the devices compute, fetched some values late, so that they have work while the host waits."""
    pending: deque[Any] = deque()
    for value in values:
        pending.append(value)
        if len(pending) > IN_FLIGHT:
            yield jax.device_get(pending.popleft())
    while pending:
        yield jax.device_get(pending.popleft())


def abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The shapes and dtypes of arrays, in a sharding."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), tree)


def is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


class Log:
    """What is measured, on its way from the devices into the metrics and onto the console.

    The measures of a step are fetched `IN_FLIGHT` steps later. A row holds the means over the steps since the row
    before, of the learning rates the last, and apart from these its timing.
    """

    LAST_VALUE = ("learning_rate", "kernel_learning_rate")

    def __init__(
        self, recipe: Recipe, task: Task, metrics: Metrics, console: Console, devices: Sequence[jax.Device]
    ) -> None:
        self.status = ""
        self._recipe, self._task, self._devices = recipe, task, devices
        self._metrics, self._console = metrics, console
        self._pending: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self._window: list[dict[str, float]] = []
        self._began = self._window_began = self._last_line = time.perf_counter()
        self._waited = 0.0

    def add(self, step: int, measures: dict[str, jax.Array]) -> None:
        self._pending.append((step, measures))
        while len(self._pending) > IN_FLIGHT:
            self._fetch()

    def catch_up(self) -> None:
        """Fetches all that is pending."""
        while self._pending:
            self._fetch()

    def _fetch(self) -> None:
        step, measures = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(measures).items()}
        self._check_finite(step, "training", values)
        self._window.append(values)
        self.status = f"loss {values['loss']:.3f}"
        if is_due(step, self._recipe.log_every, self._recipe.steps):
            self._write_window(step)

    def _write_window(self, step: int) -> None:
        now = time.perf_counter()
        seconds = max(now - self._window_began, 1e-9)
        means = {
            name: last if name in self.LAST_VALUE else float(np.mean([values[name] for values in self._window]))
            for name, last in self._window[-1].items()
        }
        examples_per_second = len(self._window) * self._recipe.batch_size / seconds
        timing = {
            "seconds": round(now - self._began, 3),
            "examples_per_second": round(examples_per_second, 3),
            **throughput(self._task, examples_per_second, self._devices),
            "waiting_for_data": round(self._waited / seconds, 4),
        }
        if (peak := peak_bytes()) is not None:
            timing["peak_bytes"] = peak
        row = {**self._place(step), "split": "train", **means, "timing": timing}
        self._metrics.add(row)
        if now - self._last_line > SECONDS_BETWEEN_LINES and not self._console.is_terminal:
            self._console.print(training_line(row, self._recipe), soft_wrap=True)
            self._last_line = now
        self._window, self._window_began, self._waited = [], now, 0.0

    def add_evaluation(self, step: int, split: str, means: dict[str, float]) -> None:
        self._check_finite(step, split, means)
        timing = {"seconds": round(time.perf_counter() - self._began, 3)}
        self._metrics.add({**self._place(step), "split": split, **means, "timing": timing})

    def print_evaluation(self, step: int) -> None:
        self._console.print(evaluation_line(self._metrics.rows, step, self._recipe), soft_wrap=True)
        self._last_line = time.perf_counter()

    def waiting_for_data(self) -> "_Stopwatch":
        """Counts the time inside as time that the loop waited for data."""

        def count(seconds: float) -> None:
            self._waited += seconds

        return _Stopwatch(count)

    def clock_stopped(self) -> "_Stopwatch":
        """Leaves the time inside out of the examples per second."""

        def shift(seconds: float) -> None:
            self._window_began += seconds

        return _Stopwatch(shift)

    def _place(self, step: int) -> Row:
        return {"step": step, "epoch": round(step * self._recipe.batch_size / len(self._task.train), 4)}

    def _check_finite(self, step: int, where: str, values: Mapping[str, float]) -> None:
        """Stops a run that cannot recover."""
        bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if bad is not None:
            rates = ", ".join(f"{name} = {values[name]:.3g}" for name in self.LAST_VALUE if name in values)
            saved = [n for n in range(1, step) if is_due(n, self._recipe.checkpoint_every, self._recipe.steps)][-1:]
            raise FloatingPointError(
                f"the {where} {bad} is {values[bad]} at step {step}{f' with {rates}' if rates else ''}, where a finite "
                "number was expected; lower learning rates or a longer warm-up may help, in another workdir. The "
                f"metrics until then are in {self._metrics.file}, "
                + (f"the last checkpoint is that of step {saved[0]}." if saved else "and there is no checkpoint yet.")
            )


class _Stopwatch:
    def __init__(self, done: Callable[[float], None]) -> None:
        self._done = done

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._done(time.perf_counter() - self._start)
