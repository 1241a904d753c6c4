"""The pictures of several runs together."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments.common.figures import plain, png
from experiments.report.runs import Run


def validation_curves(runs: Sequence[Run]) -> bytes:
    """A PNG: the training loss and the evaluated score of each run against its steps."""
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    losses, scores = figure.subplots(1, 2)
    measures = {run.score for run in runs}
    measure = "accuracy" if measures == {"accuracy"} else "loss"
    for run in runs:
        trained = [(row["step"], row["loss"]) for row in run.rows if row["split"] == "train"]
        split = "validation" if any(row["split"] == "validation" for row in run.rows) else "test"
        evaluated = [(row["step"], row[measure]) for row in run.rows if row["split"] == split and measure in row]
        (line,) = losses.plot(*zip(*trained, strict=True), lw=0.9, label=run.name) if trained else losses.plot([], [])
        if evaluated:
            scores.plot(*zip(*evaluated, strict=True), color=line.get_color(), label=f"{run.name}, {split}", marker=".")
    losses.set(xlabel="step", title="training loss")
    scores.set(xlabel="step", title=measure)
    for axes in (losses, scores):
        plain(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    if measure == "accuracy":
        scores.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return png(figure)
