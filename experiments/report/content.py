"""What the page says of runs: for each task the scores beside the published ones, the regularisation, the curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common.figures import learning_curves
from experiments.report import kernels, published
from experiments.report.figures import validation_curves
from experiments.report.kernels import Kernels
from experiments.report.page import Block, Bullets, Details, Heading, Paragraph, Picture, Table
from experiments.report.published import Benchmark
from experiments.report.recipes import Preset
from experiments.report.runs import ABLATION, Run

NOT_MEASURED = "not measured"
# Options on which no score depends.
NEUTRAL = {
    "name",
    "data_dir",
    "workers",
    "state_sharding",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "implementation",
}


class Seen(NamedTuple):
    """A run, its kernels if it has any, and all that is wrong with it."""

    run: Run
    kernels: Kernels | None
    problems: list[str]


def look(run: Run) -> Seen:
    """Reads the kernels of a run."""
    found, problems = kernels.read(run.folder, run.recipe)
    return Seen(run, found, [*run.problems, *problems])


def page(everything: Sequence[Seen], left_out: Mapping[Path, str]) -> list[Block]:
    """All blocks of the page."""
    blocks: list[Block] = []
    tasks = {task: [seen for seen in everything if title_of(seen.run) == task] for task in titles(everything)}
    for task, of_task in tasks.items():
        blocks += section(task, of_task)
    blocks += [Heading(2, "What is missing"), *missing(everything, left_out)]
    blocks += [Heading(2, "Each run")]
    blocks += [details(seen) for seen in everything]
    if any(benchmark_of(seen.run) for seen in everything):
        blocks += [Heading(2, "Where published figures come from")]
        blocks += [Bullets([f"[{tag}] {meaning}" for tag, meaning in published.tags().items()])]
    return blocks


def titles(everything: Sequence[Seen]) -> list[str]:
    return list(dict.fromkeys(title_of(seen.run) for seen in everything))


def title_of(run: Run) -> str:
    """Of the task: that of its benchmark, or the name of its recipe."""
    benchmark = benchmark_of(run)
    return str(run.recipe["name"]) if benchmark is None else benchmark.title


def benchmark_of(run: Run) -> Benchmark | None:
    return next((one for one in published.benchmarks() if one.covers(run.recipe)), None)


def section(task: str, of_task: Sequence[Seen]) -> list[Block]:
    """A task: what was measured, the regularisation if it varies, what is published, the curves."""
    runs = [seen.run for seen in of_task]
    blocks: list[Block] = [Heading(2, task), Heading(3, "Measured"), measured(runs)]
    if len({tuple(run.recipe.get(name) for name in ABLATION) for run in runs}) > 1:
        blocks += [Heading(3, "Regularisation of the kernels"), *regularization(of_task)]
    benchmark = benchmark_of(runs[0])
    if benchmark is not None:
        blocks += [Heading(3, "Published"), Paragraph(caveat(runs))]
        rows = [[figure.label, figure.value(benchmark.unit), figure.source] for figure in benchmark.published]
        blocks += [Table(["model", "score", "note"], rows)]
    if any(run.rows for run in runs):
        name = f"curves-{file_name(task)}.png"
        blocks += [Picture(name, validation_curves(runs), f"learning curves of all runs of {task}")]
    return blocks


def caveat(runs: Sequence[Run]) -> str:
    """That figures of other data or of other recipes are not to be compared."""
    departing = [run.name for run in runs if departures(run) != {}]
    text = "Published scores are those of the original data and of the full recipes."
    if departing:
        text += f" Not on the paper's recipe, or only with other options, and no reproduction: {', '.join(departing)}."
    return text


def measured(runs: Sequence[Run]) -> Table:
    """A row for each run."""
    header = ["run", "model", "score", "of split", "step", "parameters", "examples/s", "memory", "device"]
    return Table(header, [row for run in runs for row in measured_rows(run)])


def measured_rows(run: Run) -> list[list[str]]:
    speed = run.examples_per_second()
    parameters = run.last_start.get("parameters")
    end = [
        NOT_MEASURED if parameters is None else f"{parameters:,}",
        NOT_MEASURED if speed is None else f"{speed:,.0f}",
        memory(run),
        device(run),
    ]
    begin = [f"`{run.name}`", str(run.recipe.get("architecture", "long_conv"))]
    rows = []
    for split, row in run.scores().items():
        steps = f"{row['step']:,} of {run.recipe['steps']:,}"
        rows.append([*begin, f"**{score(run, row)}**", split, f"{steps}{'' if run.finished else ', unfinished'}", *end])
    return rows or [[*begin, NOT_MEASURED, "", f"{run.steps:,} of {run.recipe['steps']:,}", *end]]


def score(run: Run, row: Mapping[str, Any]) -> str:
    return f"{row[run.score]:.2%}" if run.score == "accuracy" else f"{row[run.score]:.4f}"


def memory(run: Run) -> str:
    """The most that was held, where the device counts it, else what the compiled step needs."""
    peak, plan = run.memory()
    if peak is not None:
        return f"{peak / 1e6:,.0f} MB peak"
    return NOT_MEASURED if plan is None else f"{plan / 1e6:,.0f} MB, by the compiler"


def device(run: Run) -> str:
    """What the run was made on, all of them if starts differ."""
    names = dict.fromkeys(f"{start.get('device_count', 1)} × {start.get('device', 'unknown')}" for start in run.starts)
    return ", then ".join(names)


def regularization(of_task: Sequence[Seen]) -> list[Block]:
    """Scores and smoothness by the initialisation and the regularisation of the kernels."""
    header = ["initialisation", "regularisation", "run", "score", "published", "total variation", "high frequencies"]
    rows = []
    for run, found, _ in of_task:
        scores = run.scores()
        row = scores.get("test") or scores.get("validation")
        smoothness = [NOT_MEASURED] * 3
        if found is not None:
            values = found.variation(), found.high_frequencies()
            smoothness = [*map(kernels.summary, values), f"{found.alive().mean():.1%}"]
        rows.append(
            [
                str(run.recipe.get("kernel_init", "")).replace("_", " "),
                regularization_of(run),
                f"`{run.name}`",
                NOT_MEASURED if row is None else score(run, row),
                published_beside(run),
                *smoothness,
            ]
        )
    explained = (
        "Of every kernel as it is convolved with, the median over all kernels and their range. Total variation is "
        "normalised, the sum of |k(t+1) − k(t)| over that of |k(t)|: independent taps have 1.41. High frequencies are "
        "the share of the energy above a quarter of a cycle per step, half of the highest frequency: independent taps "
        "have 0.5."
    )
    return [Table([*header, "taps alive"], rows), Paragraph(explained)]


def regularization_of(run: Run) -> str:
    """none, smooth, squash or both."""
    smooth, squash = run.recipe.get("smooth_width", 1) > 1, run.recipe.get("squash_threshold", 0) > 0
    return {(0, 0): "none", (1, 0): "smooth", (0, 1): "squash", (1, 1): "both"}[smooth, squash]


def published_beside(run: Run) -> str:
    """The published score of the same kernels."""
    benchmark = benchmark_of(run)
    same = str(run.recipe.get("kernel_init")), regularization_of(run)
    figures = [f for f in benchmark.published if (f.kernel_init, f.regularization) == same] if benchmark else []
    return figures[0].value(benchmark.unit) if benchmark and figures else "no figure"


def missing(everything: Sequence[Seen], left_out: Mapping[Path, str]) -> list[Block]:
    """Which folders are left out or not whole, and why."""
    items = [f"left out: {reason}" for reason in left_out.values()]
    items += [f"`{seen.run.name}`: {problem}" for seen in everything for problem in seen.problems]
    return [Bullets(items) if items else Paragraph("Nothing: all runs are finished and whole.")]


def details(seen: Seen) -> Details:
    """All that is known of one run."""
    run, found, _ = seen
    blocks: list[Block] = []
    if run.rows:
        name = f"curves-{file_name(run.name)}.png"
        blocks += [Picture(name, learning_curves(run.rows), f"learning curves of {run.name}")]
    if found is not None:
        text = f"kernels of {run.name} after step {found.step:,}, as stored and as used, and their spectra"
        blocks += [Picture(f"kernels-{file_name(run.name)}.png", kernels.picture(found), text), smoothness(found)]
    preset = preset_of(run)
    if preset is not None:
        differing = differences(run, preset)
        listed = ", ".join(f"`{name}` {here} instead of {there}" for name, (here, there) in differing.items())
        blocks += [Paragraph(f"Against the preset `{preset.name}`: {listed or 'no other options'}.")]
    options = [[f"`{name}`", f"`{value}`"] for name, value in run.recipe.items() if name != "name"]
    blocks += [Table(["option", "value"], options)]
    starts = [
        [f"{start.get('step', 0):,}", str(start.get("time", "")), device_of(start), versions(start)]
        for start in run.starts
    ]
    blocks += [Table(["from step", "time", "device", "versions"], starts)]
    return Details(f"{run.name}: {run.recipe['name']}", blocks)


def device_of(start: Mapping[str, Any]) -> str:
    return f"{start.get('device_count', 1)} × {start.get('device', 'unknown')}"


def versions(start: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in dict(start.get("versions", {})).items())


def smoothness(found: Kernels) -> Table:
    """Of the kernels of each layer."""
    values = found.variation(), found.high_frequencies()
    rows = [
        [str(layer + 1), *(kernels.summary(each[layer]) for each in values), f"{np.mean(found.alive()[layer]):.1%}"]
        for layer in range(len(found.used))
    ]
    return Table(["layer", "total variation", "high frequencies", "taps alive"], rows)


def departures(run: Run) -> dict[str, tuple[Any, Any]] | None:
    """Options in which a run differs from the full preset of its task; None if there is none."""
    preset = preset_of(run)
    return None if preset is None else differences(run, preset)


def differences(run: Run, preset: Preset) -> dict[str, tuple[Any, Any]]:
    """Option -> the run's value and the preset's, where they differ and a model's score may depend on them."""
    here, there = run.recipe, preset.options
    return {
        name: (here[name], there.get(name)) for name in here if name not in NEUTRAL and here[name] != there.get(name)
    }


def preset_of(run: Run) -> Preset | None:
    """The full preset of the run's task; of several, such as the sizes of language models, the nearest."""
    from experiments.report.recipes import presets

    benchmark = benchmark_of(run)
    of_task = [
        preset
        for preset in presets()
        if preset.options["name"] == run.recipe["name"] and (benchmark is None or benchmark.covers(preset.options))
    ]
    return min(of_task, key=lambda preset: len(differences(run, preset)), default=None)


def file_name(text: str) -> str:
    """The text with what is no letter or digit replaced."""
    return "".join(letter if letter.isalnum() else "-" for letter in text).strip("-").lower()
