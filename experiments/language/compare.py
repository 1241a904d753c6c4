"""Language models on equal data and steps in one table and one picture: `python -m experiments.language.compare`.

Each run has a folder of its own below that of the comparison, `MODEL-rate0.003` where a learning rate is tried and then
`MODEL-seed0-rate0.003`, and goes on there to the bit. What is known is written again after each of them.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.common import comparison
from experiments.common.command import Command
from experiments.common.comparison import markdown_table
from experiments.common.errors import RunError
from experiments.common.several import is_finished, train_all
from experiments.common.workdir import write_whole
from experiments.language.corpus import SplitName
from experiments.language.figures import bits_curves
from experiments.language.perplexity import Perplexity
from experiments.language.quality import MEASURED, bigram, bits_per_byte, compressors, measured, per_byte
from experiments.language.recipe import Language
from experiments.language.tokens import Tokens
from experiments.language.train import RECIPES
from experiments.language.trained import load
from experiments.report.runs import Run, read

type Model = Literal["transformer", "h3", "h3_long_conv", "butterfly"]
PROG = "python -m experiments.language.compare"
USAGE = """Trains each model with each seed on the same batches for as many steps, and writes comparison.json,
comparison.md and comparison.png into the folder after each run. A killed comparison goes on where it was with the same
command, and goes further with more seeds or rates. `butterfly` is `h3_long_conv` whose convolutions learn the blocks of
their transforms, in the causal form, and whose MLPs are learned butterflies; the Transformer has rotary positions.

Besides the options below there are --task TASK, --preset PRESET (of which `comparison` takes about an hour of a CPU
core), --workdir FOLDER and those of `python -m experiments.language.train --task TASK --help`, for all models."""

VARIANTS: Mapping[Model, Mapping[str, Any]] = {
    "transformer": {"mixer": "attention", "rotary": True},
    "h3": {"mixer": "h3"},
    "h3_long_conv": {"mixer": "h3_long_conv"},
    "butterfly": {"mixer": "h3_long_conv", "butterfly": "causal", "mlp": "butterfly"},
}
"""Options in which the models differ, besides their learning rates."""
VARIED = tuple(dict.fromkeys(["seed", "learning_rate", *(name for options in VARIANTS.values() for name in options)]))
SPLITS: tuple[SplitName, ...] = ("validation", "test")


@dataclass(frozen=True)
class Options:
    models: tuple[Model, ...] = get_args(Model.__value__)
    """What to compare."""

    seeds: tuple[int, ...] = (0, 1)
    """Each fixes an initialisation and an order of the data, which is the same for all models."""

    learning_rates: tuple[float, ...] = (0.00075, 0.0015, 0.003, 0.006, 0.012)
    """Peaks to choose from, for each model that of the lowest validation loss in a short run; one is not tried."""

    tuning_steps: int = 100
    """Of those short runs, with a schedule as much shorter, and the first seed."""

    def __post_init__(self) -> None:
        for name in ("models", "seeds", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be at least one, each once; got {values}.")
        if len({f"{rate:g}" for rate in self.learning_rates}) < len(self.learning_rates):
            raise ValueError(f"learning_rates must differ in their first six digits; got {self.learning_rates}.")
        if self.tuning_steps < 1:
            raise ValueError(f"tuning_steps must be at least 1; got {self.tuning_steps}.")


def variant(recipe: Language, model: Model, **changes: Any) -> Language:
    """The recipe with what makes up a model."""
    return dataclasses.replace(recipe, **{**VARIANTS[model], **changes})


def shortened(recipe: Language, steps: int) -> Language:
    """The recipe with fewer steps, a warm-up as much shorter, and one evaluation, in the end."""
    steps = min(steps, recipe.steps)
    warmup = recipe.warmup_steps * steps // recipe.steps
    return dataclasses.replace(recipe, steps=steps, warmup_steps=warmup, decay_steps=None, evaluate_every=steps)


class Comparison:
    """What is known so far of all runs in a folder, and how to know more."""

    def __init__(self, title: str, recipe: Language, options: Options, folder: Path, console: Console) -> None:
        self.title, self.recipe, self.options, self.folder, self.console = title, recipe, options, folder, console
        self.tokens: Tokens = recipe.tokens()
        self.baselines = {split: baselines(self.tokens, split) for split in SPLITS}
        self.tried: dict[str, dict[str, float | None]] = {}
        self.rates: dict[Model, float] = {}
        self.failed: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Trains and measures what is missing; the record, as it is in comparison.json."""
        self._choose_rates()
        recipes = {
            self._name(model, seed): variant(self.recipe, model, learning_rate=rate, seed=seed)
            for seed in self.options.seeds  # outside, so that an early end leaves as much of each model
            for model, rate in self.rates.items()
        }
        for name, recipe in recipes.items():  # before anything is written: folders of other recipes are refused
            is_finished(self.folder / name, recipe)
        failed = train_all(recipes, self.folder, self.console, self._measure)
        self.failed = {name: without_places(reason) for name, reason in failed.items()}
        return self._write()

    def _name(self, model: Model, seed: int) -> str:
        return f"{model}-seed{seed}-rate{self.rates[model]:g}"

    def _choose_rates(self) -> None:
        options = self.options
        if len(options.learning_rates) == 1:
            self.rates = dict.fromkeys(options.models, options.learning_rates[0])
            return
        short = dataclasses.replace(shortened(self.recipe, options.tuning_steps), seed=options.seeds[0])
        for model in options.models:
            recipes = {
                f"{model}-rate{rate:g}": variant(short, model, learning_rate=rate) for rate in options.learning_rates
            }
            failed = train_all(recipes, self.folder, self.console)
            losses = {
                rate: None if name in failed else last_loss(read(self.folder / name))
                for rate, name in zip(options.learning_rates, recipes, strict=True)
            }
            self.tried[model] = {f"{rate:g}": loss for rate, loss in losses.items()}
            finite = {rate: loss for rate, loss in losses.items() if loss is not None}
            if not finite:
                raise RunError(
                    f"learning_rates must have one at which {model} can be trained; got {[*losses]}: "
                    f"{'; '.join(dict.fromkeys(failed.values()))}"
                )
            self.rates[model] = min(finite, key=finite.__getitem__)

    def _measure(self, name: str) -> None:
        """Exact bits per byte of a finished run, kept in its folder; and the record with it."""
        file = self.folder / name / "quality.json"
        if not file.exists():
            trained = load(self.folder / name)
            found = {
                split: measured(trained.recipe, trained.variables["params"], split, self.console)._asdict()
                for split in SPLITS
            }
            write_whole(file, json.dumps(found).encode())
        self._write()

    def _write(self) -> dict[str, Any]:
        record = self._record()
        write_whole(self.folder / "comparison.json", (json.dumps(record, indent=1) + "\n").encode())
        write_whole(self.folder / "comparison.md", markdown(record).encode())
        if any(row["seeds"] for row in record["rows"]):
            write_whole(self.folder / "comparison.png", bits_curves(record))
        return record

    def _record(self) -> dict[str, Any]:
        left_out = {*VARIED, *self.recipe.whereabouts}
        recipe = {name: value for name, value in asdict(self.recipe).items() if name not in left_out}
        rows = [self._row(model) for model in self.options.models]
        starts = [seed.pop("start") for row in rows for seed in row["seeds"]]
        return {
            "title": self.title,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "devices": sorted({f"{start['device']}, {start['cpu_cores']} cores" for start in starts}),
            "versions": starts[-1]["versions"] if starts else {},
            "recipe": {name: str(value) if isinstance(value, Path) else value for name, value in recipe.items()},
            "seeds": self.options.seeds,
            "tuning": {"steps": min(self.options.tuning_steps, self.recipe.steps), "validation_loss": self.tried},
            "rows": rows,
            "baselines": self.baselines,
        }

    def _row(self, model: Model) -> dict[str, Any]:
        """What the finished seeds of a model reached."""
        names = {seed: self._name(model, seed) for seed in self.options.seeds}
        there = {seed: name for seed, name in names.items() if (self.folder / name / "quality.json").exists()}
        seeds = [self._seed(seed, self.folder / name) for seed, name in there.items()]
        row: dict[str, Any] = {"model": model, "learning_rate": self.rates[model]}
        row |= {"parameters": seeds[0]["start"]["parameters"] if seeds else None}
        for split in SPLITS:
            bits = [seed[split] for seed in seeds]
            row[split] = float(np.mean(bits)) if bits else None
            row[f"{split}_deviation"] = float(np.std(bits, ddof=1)) if len(bits) > 1 else None
        row["ms_per_step"] = float(np.median([seed["ms_per_step"] for seed in seeds])) if seeds else None
        row["failed"] = {str(seed): self.failed[name] for seed, name in names.items() if name in self.failed}
        return row | {"seeds": seeds}

    def _seed(self, seed: int, folder: Path) -> dict[str, Any]:
        run, found = read(folder), json.loads((folder / "quality.json").read_text())
        bits: dict[str, float] = {
            split: bits_per_byte(Perplexity(**found[split]), self.tokens.info[split]) for split in SPLITS
        }
        examples_per_second = run.examples_per_second()
        curves = {
            split: [
                (row["step"], round(per_byte(row["loss"], self.tokens.info[split]), 4))
                for row in run.rows
                if row["split"] == split
            ]
            for split in ("train", "validation")
        }
        ms = 1e3 * self.recipe.batch_size / examples_per_second if examples_per_second else math.nan
        return {"seed": seed, **bits, "ms_per_step": ms, "curves": curves, "start": run.last_start}


def baselines(tokens: Tokens, split: SplitName) -> dict[str, float]:
    """Bits per byte without a neural network."""
    info, pairs = tokens.info[split], bigram(tokens, split)
    of_pairs = {} if pairs is None else {"bigrams of the training text": bits_per_byte(pairs, info)}
    return of_pairs | compressors(info)


def without_places(reason: str) -> str:
    """Why a run failed, without the folder that its message ends with."""
    return reason.split(", where a finite number")[0]


def last_loss(run: Run) -> float | None:
    """On validation, in the end; None of a run that did not get there."""
    rows = [row for row in run.rows if row["split"] == "validation" and row["step"] == run.recipe["steps"]]
    return rows[-1]["loss"] if rows else None


def table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows, those of baselines last."""
    device = "CPU" if all("cpu" in device.lower() for device in record["devices"]) else "the device"
    first = record["rows"][0]
    header = ["model", "parameters", f"to {first['model']}", "learning rate", "validation, bits per byte", "each seed"]
    header += ["test, bits per byte", f"ms per step, {device}"]
    rows = []
    for row in record["rows"]:
        both = row["parameters"] and first["parameters"]
        rows.append(
            [
                ", ".join([row["model"], *missing(row, len(record["seeds"]))]),
                number(row["parameters"], ",.0f"),
                number(row["parameters"] / first["parameters"] - 1 if both else None, "+.0%"),
                f"{row['learning_rate']:g}",
                with_deviation(row, "validation"),
                " · ".join(f"{seed['validation']:.3f}" for seed in row["seeds"]),
                with_deviation(row, "test"),
                number(row["ms_per_step"], ",.0f"),
            ]
        )
    validation, test = (record["baselines"][split] for split in SPLITS)
    for name in test | validation:
        bits = [f"{values[name]:.3f}" if name in values else "" for values in (validation, test)]
        rows.append([name, "", "", "", bits[0], "", bits[1], ""])
    return header, rows


def missing(row: Mapping[str, Any], seeds: int) -> list[str]:
    """What is to be said of seeds that are not in a row's means."""
    count = seeds - len(row["seeds"])
    reasons = [f"seed {seed}: {reason}" for seed, reason in row["failed"].items()]
    return [f"{count} of {seeds} seeds missing", *reasons] if count else []


def with_deviation(row: Mapping[str, Any], split: str) -> str:
    deviation = row[f"{split}_deviation"]
    return number(row[split], ".3f") + ("" if deviation is None else f" ± {deviation:.3f}")


def number(value: float | None, form: str) -> str:
    return "not measured" if value is None else f"{value:{form}}"


def markdown(record: Mapping[str, Any]) -> str:
    """The table as a page of its own."""
    recipe = record["recipe"]
    tried: Mapping[str, Mapping[str, Any]] = record["tuning"]["validation_loss"]
    rates = ", ".join(next(iter(tried.values()))) if tried else ""
    tuned = f", of {rates} that with the lowest loss after {record['tuning']['steps']} steps" if tried else ""
    explained = (
        f"{recipe['steps']:,} steps of {recipe['batch_size']} windows of {recipe['length']:,} tokens, the same for all "
        "models; mean ± standard deviation over the seeds. Learning rates are peaks"
        f"{tuned}. Bits per byte are exact, in windows that begin every half length, of at most {MEASURED:,} tokens of "
        "a split; compressors read all of it. Times per step are medians over the runs and hold for this device, with "
        f"what else it did: {'; '.join(record['devices'])}. {record['date']}, "
        f"{', '.join(f'{name} {version}' for name, version in record['versions'].items())}."
    )
    return f"# {record['title']}\n\n{markdown_table(*table(record))}\n\n{explained}\n"


def check_unvaried(recipe: Language, preset: Language) -> None:
    """Refuses options that the comparison sets by itself.

    Raises:
      RunError: naming one.
    """
    for name in VARIED:
        value = getattr(recipe, name)
        if value != getattr(preset, name):
            raise RunError(f"{name} must not be given, as it differs from model to model or run to run; got {value}.")


def compare(command: Command, options: Options, folder: Path) -> dict[str, Any]:
    """Trains what is not trained yet, and shows all of it."""
    check_unvaried(command.recipe, RECIPES[command.task][command.preset])
    console = Console()
    try:
        title = f"Language models, {command.task}, preset {command.preset}"
        record = Comparison(title, command.recipe, options, folder, console).run()
    except ValueError as error:  # of the text
        raise RunError(str(error)) from error
    header, rows = table(record)
    columns = [header.index(name) for name in header if name.startswith(("model", "parameters", "validation", "test"))]
    shown = Table(*(header[column] for column in columns), title=record["title"], title_justify="left")
    for row in rows:
        shown.add_row(*(row[column] for column in columns))
    console.print(shown)
    written = [ending for ending in ("md", "json", "png") if (folder / f"comparison.{ending}").exists()]
    console.print(f"{folder / 'comparison'}.{', .'.join(written)}", soft_wrap=True)
    return record


def main() -> None:
    comparison.main(Options, compare, prog=PROG, usage=USAGE, recipes=RECIPES)


if __name__ == "__main__":
    main()
