"""Trains a LongConv classifier on handwritten digits, read as sequences of 1,024 pixels.

`main` is at the end; `train` is the whole run, in the order in which things happen.
"""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import flashbutterfly_jax as fb
from experiments.digits import data, figures
from experiments.digits.config import Config, from_command_line
from experiments.digits.report import Report

TARGET = 0.97  # of the test images; the defaults stay above it
EVALUATED_AT_ONCE = 100  # images: four batches of one shape, compiled once

type Measures = dict[str, float]


class State(NamedTuple):
    """Everything that a step changes."""

    params: Any
    optimizer: optax.OptState
    key: jax.Array


def train(config: Config, train_split: data.Split, test_split: data.Split, report: Report, console: Console) -> State:
    """Fills the report and shows the progress.

    Raises:
      FloatingPointError: as soon as a loss is not finite.
    """
    report.describe(config)
    steps = len(train_split.labels) // config.batch_size
    model = make_model(config)
    optimizer = make_optimizer(config, steps)
    state = initial_state(config, model, optimizer)
    kernels = [stored_and_squashed("at initialisation", state.params, config)]
    train_step, evaluate = make_train_step(model, optimizer), make_evaluation(model)

    rng = np.random.default_rng(config.seed)
    start = time.perf_counter()
    with progress_bar(console) as progress:
        task = progress.add_task("", total=config.epochs * steps, status="compiling")
        for epoch in range(1, config.epochs + 1):
            history = []
            for batch in data.batches(train_split, config.batch_size, config.shift, rng):
                state, measures = train_step(state, *batch)
                history.append({name: float(value) for name, value in measures.items()})
                check_finite(history[-1]["train_loss"], epoch, len(history), config)
                progress.update(task, advance=1, status=f"train loss {history[-1]['train_loss']:.3f}")
            row = {"epoch": epoch, **mean(history), **evaluate(state.params, test_split)}
            report.log(**row, seconds=round(time.perf_counter() - start, 2))
            progress.console.print(describe_epoch(report.rows[-1], config))

    kernels.append(stored_and_squashed("trained", state.params, config))
    report.write("learning_curves.png", figures.learning_curves(report.rows, TARGET))
    report.write("kernels.png", figures.kernels(kernels, config.squash_threshold))
    report.write("spectra.png", figures.spectra(kernels))
    images = config.epochs * steps * config.batch_size
    console.print(result_table(report, state.params, kernels[-1].after, images))
    return state


def make_model(config: Config) -> Any:
    """A stack of residual long convolutions, the mean over the pixels, and a linear layer."""
    layer = functools.partial(
        fb.linen.LongConv,
        channels=config.channels,
        squash_threshold=config.squash_threshold,
        kernel_dropout_rate=config.kernel_dropout_rate,
    )
    return fb.linen.SequenceClassifier(
        num_classes=data.CLASSES,
        features=config.features,
        num_layers=config.layers,
        kernel_length=data.SIDE**2,
        layer=layer,
    )


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """AdamW, under which the kernels have a learning rate of their own and no decay."""
    return fb.optim.adamw(
        config.learning_rate,
        kernel_learning_rate=config.kernel_learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        total_steps=config.epochs * steps_per_epoch,
    )


def initial_state(config: Config, model: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    params = model.init(init_key, jnp.zeros((1, data.SIDE**2, 1)), deterministic=True)["params"]
    return State(params, optimizer.init(params), dropout_key)


def make_train_step(
    model: Any, optimizer: optax.GradientTransformation
) -> Callable[[State, np.ndarray, np.ndarray], tuple[State, dict[str, jax.Array]]]:
    """A function of the state, pixels and labels that gives the next state, in the memory of the last, and measures."""

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: State, pixels: jax.Array, labels: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        key, dropout_key = jax.random.split(state.key)

        def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
            logits = model.apply({"params": params}, pixels, deterministic=False, rngs={"dropout": dropout_key})
            return cross_entropy(logits, labels).mean(), logits

        (loss, logits), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        measures = {
            "train_loss": loss,
            "train_accuracy": (logits.argmax(-1) == labels).mean(),
            "gradient_norm": optax.tree.norm(gradient),
        }
        return State(optax.apply_updates(state.params, updates), optimizer_state, key), measures

    return train_step


def make_evaluation(model: Any) -> Callable[[Any, data.Split], Measures]:
    """A function of the parameters and a split that gives the mean loss and the accuracy."""

    @jax.jit
    def sums(params: Any, pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, pixels, deterministic=True)
        return cross_entropy(logits, labels).sum(), (logits.argmax(-1) == labels).sum()

    def evaluate(params: Any, split: data.Split) -> Measures:
        rows = len(split.labels)
        starts = range(0, rows, EVALUATED_AT_ONCE)
        parts = [sums(params, *split.take(slice(start, start + EVALUATED_AT_ONCE))) for start in starts]
        loss, correct = np.sum(jax.device_get(parts), axis=0)
        return {"test_loss": float(loss / rows), "test_accuracy": float(correct / rows)}

    return evaluate


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of each sequence, in nats."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def check_finite(loss: float, epoch: int, step: int, config: Config) -> None:
    """Stops a run that cannot recover."""
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the training loss is {loss} at step {step} of epoch {epoch}, where a finite number was expected; "
            f"learning_rate = {config.learning_rate} and kernel_learning_rate = {config.kernel_learning_rate} may be "
            "too high"
        )


def mean(history: Iterable[Measures]) -> Measures:
    """Of each measure over the steps of an epoch."""
    history = list(history)
    return {name: float(np.mean([row[name] for row in history])) for name in history[0]}


def stored_and_squashed(when: str, params: Any, config: Config) -> figures.Kernels:
    """Copies of the kernels of all layers, as stored and as the convolution uses them."""
    stored = params["blocks"]["layer"]["kernel"]
    return figures.Kernels(when, np.array(stored), np.array(fb.squash(stored, config.squash_threshold)))


def progress_bar(console: Console) -> Progress:
    """Live on a terminal; elsewhere the lines of the epochs are all there is."""
    return Progress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        transient=True,
        disable=not console.is_terminal,
    )


def describe_epoch(row: Measures, config: Config) -> str:
    """One line of progress."""
    return (
        f"epoch {row['epoch']:2}/{config.epochs}   train loss {row['train_loss']:.3f}   "
        f"test loss {row['test_loss']:.3f}   test accuracy {row['test_accuracy']:6.1%}   {row['seconds']:4.0f} s"
    )


def result_table(report: Report, params: Any, kernels: np.ndarray, images: int) -> Table:
    """What the run reached, at what cost, and where to look further."""
    last = report.rows[-1]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    verdict = "[green]reached[/]" if last["test_accuracy"] >= TARGET else "[red]missed[/]"
    table = Table(title="handwritten digits as sequences of 1,024 pixels", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row("test accuracy", f"[bold]{last['test_accuracy']:.2%}[/]   (target {TARGET:.0%}: {verdict})")
    table.add_row("test loss", f"{last['test_loss']:.4f}")
    table.add_row("time", f"{last['seconds']:.0f} s, compilation and evaluation included")
    table.add_row("speed", f"{images / last['seconds']:.0f} images per second")
    table.add_row("parameters", f"{count:,}, of which {kernels.size:,} kernel taps")
    table.add_row("taps alive", f"{np.mean(kernels != 0):.0%} after squashing")
    table.add_row("report", "\n".join([f"{report.folder}/", *sorted(f"  {f.name}" for f in report.folder.iterdir())]))
    return table


def main() -> None:
    """Runs what the command line asks for; what can go wrong outside of the program is one sentence."""
    try:
        config = from_command_line()
        report = Report(config.report_dir)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    try:
        train(config, *data.load(), report, Console())
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}. What was measured so far is in {report.folder}.") from error
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted. What was measured so far is in {report.folder}.") from None


if __name__ == "__main__":
    main()
