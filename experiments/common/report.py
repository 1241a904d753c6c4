"""What a run shows: a progress bar on a terminal, plain lines elsewhere, and a table in the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.common.task import Recipe, Task
from experiments.common.workdir import Row


def progress_bar(console: Console) -> Progress:
    """Live on a terminal; elsewhere the lines are all there is."""
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


def training_line(row: Row, recipe: Recipe) -> str:
    """One line of progress between evaluations."""
    return (
        f"step {row['step']:{len(str(recipe.steps))}}/{recipe.steps}   epoch {row['epoch']:.2f}   "
        f"train loss {row['loss']:.3f}   {row['timing']['examples_per_second']:.1f} examples/s"
    )


def evaluation_line(rows: Sequence[Row], step: int, recipe: Recipe) -> str:
    """One line with the latest means of training and all splits evaluated after a step."""
    evaluated = [row for row in rows if row["step"] == step and row["split"] != "train"]
    latest = [row for row in rows if row["split"] == "train"][-1:]
    parts = [f"{row['split']} loss {row['loss']:.3f}" for row in [*latest, *evaluated]]
    parts += [f"{row['split']} accuracy {row['accuracy']:.1%}" for row in evaluated if "accuracy" in row]
    row = (evaluated or latest)[-1]
    start = f"step {step:{len(str(recipe.steps))}}/{recipe.steps}   epoch {row['epoch']:.2f}"
    return "   ".join([start, *parts, f"{row['timing']['seconds']:.0f} s"])


def selected(rows: Sequence[Row], score: str) -> dict[str, Row]:
    """By split, the rows of the evaluation that counts: the best one on `validation`, or else the last one.

    Of equal ones the first counts.
    """
    evaluated = [row for row in rows if row["split"] != "train"]
    if not evaluated:
        return {}
    step = max(row["step"] for row in evaluated)
    validation = [row for row in evaluated if row["split"] == "validation"]
    if validation:
        sign = -1 if score == "loss" else 1
        step = max(validation, key=lambda row: sign * row[score])["step"]
    return {row["split"]: row for row in evaluated if row["step"] == step}


def result_table(
    recipe: Recipe, task: Task, rows: Sequence[Row], params: Any, folder: Path, compilation: float
) -> Table:
    """What the run reached, at what cost, and where to look further."""
    table = Table(title=type(recipe).__name__, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for split, row in selected(rows, task.score).items():
        best = ", where validation was best" if "validation" in task.evaluation and split != "validation" else ""
        value = f"{row[task.score]:.2%}" if task.score == "accuracy" else f"{row[task.score]:.4f}"
        table.add_row(f"{split} {task.score}", f"[bold]{value}[/]   after step {row['step']:,}{best}")
    speeds = [row["timing"]["examples_per_second"] for row in rows if row["split"] == "train"]
    if speeds:
        table.add_row("speed", f"{sorted(speeds)[len(speeds) // 2]:,.0f} examples per second of training, the median")
        table.add_row(
            "time",
            f"{rows[-1]['timing']['seconds']:,.0f} s since the last start, and {compilation:.0f} s of compilation",
        )
    table.add_row("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}")
    table.add_row("folder", str(folder))
    return table
