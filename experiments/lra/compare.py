"""Long convolutions beside a Transformer, S4D and S5, in one run: `python -m experiments.lra.compare --help`."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.table import Table

from experiments.common import comparison
from experiments.common.classifier import ClassifierRecipe
from experiments.common.command import Command
from experiments.common.comparison import markdown_table
from experiments.common.errors import RunError
from experiments.common.several import train_all
from experiments.common.task import Recipe
from experiments.common.workdir import write_whole
from experiments.lra.train import RECIPES
from experiments.report.runs import Run, read

type Architecture = Literal["long_conv", "transformer", "s4d", "s5"]
PROG = "python -m experiments.lra.compare"
USAGE = """Trains each model on the same data, in the same order, for as many steps, at the same width and depth, and
writes comparison.json and comparison.md into the folder, whose runs `python -m experiments.report FOLDER` shows in
full. A killed comparison goes on where it was with the same command.

Transformers have at most a learning rate of {transformer}, and what is slow in state-space models at most one of
{state_space}: ours, since the recipes are those of long convolutions. Besides the options below there are --task TASK,
--preset PRESET, --workdir FOLDER and those of `python -m experiments.lra.train --task TASK --help`, for all models."""

PEAK_OF_TRANSFORMER = 0.001  # usual for Adam; not tuned here
PEAK_OF_STATE_SPACE = 0.001  # of A, B and the time steps: that of the authors of S4D and S5


@dataclass(frozen=True)
class Models:
    models: tuple[Architecture, ...] = get_args(Architecture.__value__)
    """What to compare."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError(f"models must be at least one; got {self.models}.")


def variants(recipe: ClassifierRecipe, models: tuple[Architecture, ...]) -> dict[str, ClassifierRecipe]:
    """The recipe with the layers of each model, and learning rates that are usual for it."""

    def at_most(rate: float | None, limit: float) -> float:
        return min(recipe.learning_rate if rate is None else rate, limit)

    rates: Mapping[Architecture, dict[str, Any]] = {
        "long_conv": {},
        "transformer": {"learning_rate": at_most(recipe.learning_rate, PEAK_OF_TRANSFORMER)},
        "s4d": {"kernel_learning_rate": at_most(recipe.kernel_learning_rate, PEAK_OF_STATE_SPACE)},
        "s5": {"kernel_learning_rate": at_most(recipe.kernel_learning_rate, PEAK_OF_STATE_SPACE)},
    }
    return {name: dataclasses.replace(recipe, architecture=name, **rates[name]) for name in dict.fromkeys(models)}


def compared(runs: Mapping[str, Run], failed: Mapping[str, str]) -> list[dict[str, Any]]:
    """What was measured of each model; None where it was not, with `failed` as the reason."""
    rows = []
    all_scores = {name: run.scores() for name, run in runs.items()}
    # Some tasks have no validation split, and then there is nothing that could have been measured.
    splits = ["validation", "test"] if any("validation" in scores for scores in all_scores.values()) else ["test"]
    for name, run in runs.items():
        scores = all_scores[name]
        peak, planned = run.memory()
        row: dict[str, Any] = {"model": name, "parameters": run.last_start.get("parameters")}
        for split in splits:
            row[f"{split}_{run.score}"] = scores[split][run.score] if split in scores else None
        row |= {
            "examples_per_second": run.examples_per_second(),
            "step_bytes_planned": planned,
            "process_peak_bytes": peak,
            "learning_rate": run.recipe["learning_rate"],
            "kernel_learning_rate": run.recipe["kernel_learning_rate"],
            "device": run.last_start.get("device"),
            "finished": run.finished,
            "failed": failed.get(name),
        }
        rows.append(row)
    speeds = {row["model"]: row["examples_per_second"] for row in rows}
    for row in rows:
        both = row["examples_per_second"] and speeds.get("transformer")
        row["speed_over_transformer"] = row["examples_per_second"] / speeds["transformer"] if both else None
    return rows


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table for people."""

    def text(value: Any, form: str, unit: float = 1) -> str:
        return "not measured" if value is None else f"{value / unit:{form}}"

    scores = [text(value, ".2%" if "accuracy" in name else ".4f") for name, value in row.items() if is_score(name)]
    return [
        row["model"] + ("" if row["finished"] else f", {row['failed'] or 'unfinished'}"),
        *scores,
        text(row["examples_per_second"], ",.1f"),
        text(row["speed_over_transformer"], ".2f"),
        text(row["parameters"], ",.0f"),
        text(row["step_bytes_planned"], ",.0f", 1e6),
        f"{row['learning_rate']:g}, {row['kernel_learning_rate'] or row['learning_rate']:g}",
    ]


def is_score(name: str) -> bool:
    return name.startswith(("validation_", "test_"))


def header(row: Mapping[str, Any]) -> list[str]:
    scores = [name.replace("_", " ") for name in row if is_score(name)]
    speed = ["examples/s", "over Transformer", "parameters", "step's memory, MB", "learning rates, of kernels"]
    return ["model", *scores, *speed]


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """The table as a page of its own."""
    table = markdown_table(header(rows[0]), [cells(row) for row in rows])
    devices = ", ".join(dict.fromkeys(str(row["device"]) for row in rows))
    explained = (
        "The scores are those after the step that is best on the validation split, or the last one. The speed is the "
        "median over the run, evaluation and compilation left out; the memory is the compiler's plan for one device. "
        f"Device: {devices}."
    )
    return f"# {title}\n\n{table}\n\n{explained}\n"


def compare(title: str, recipe: Recipe, models: tuple[Architecture, ...], folder: Path) -> list[dict]:
    """Trains what is not trained yet, and writes comparison.json and comparison.md into the folder."""
    if not isinstance(recipe, ClassifierRecipe):
        raise RunError(f"task must be one whose layers can be exchanged; got {title}.")
    recipes = variants(recipe, models)
    failed = train_all(recipes, folder, Console())
    for name, reason in failed.items():
        if not (folder / name / "run.json").exists():  # not even its first step could be compiled
            raise RunError(f"{name} cannot be trained: {reason}")
    rows = compared({name: read(folder / name) for name in recipes}, failed)
    write_whole(folder / "comparison.json", (json.dumps({"title": title, "rows": rows}, indent=2) + "\n").encode())
    write_whole(folder / "comparison.md", markdown(title, rows).encode())
    table = Table(*header(rows[0]), title=title, title_justify="left")
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)
    return rows


def main() -> None:
    usage = USAGE.format(transformer=PEAK_OF_TRANSFORMER, state_space=PEAK_OF_STATE_SPACE)

    def start(command: Command, chosen: Models, folder: Path) -> None:
        compare(f"{command.task}, preset {command.preset}", command.recipe, chosen.models, folder)

    comparison.main(Models, start, prog=PROG, usage=usage, recipes=RECIPES)


if __name__ == "__main__":
    main()
