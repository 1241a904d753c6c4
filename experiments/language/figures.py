"""The learning curves of compared language models."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.common.figures import QUIET, plain, png

COLOURS = ("#1f5fa8", "#d9822b", "#7a9e3f", "#9a4f96")


def bits_curves(record: Mapping[str, Any]) -> bytes:
    """A PNG of the record of a comparison: bits per byte against the step, in training and on validation.

    Means over the seeds as lines, each seed as a faint one; compressors as broken lines.
    """
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, split in zip(panels, ("train", "validation"), strict=True):
        for row, colour in zip(record["rows"], COLOURS, strict=False):
            curves = [np.array(seed["curves"][split]) for seed in row["seeds"]]
            if not curves:
                continue
            for curve in curves:
                axes.plot(*curve.T, color=colour, lw=0.6, alpha=0.4)
            label = f"{row['model']}, {row['parameters']:,} parameters"
            mark = {"marker": "o", "ms": 3.5} if split == "validation" else {"lw": 1}
            axes.plot(curves[0][:, 0], np.mean([curve[:, 1] for curve in curves], 0), color=colour, label=label, **mark)
        axes.set(xlabel="step", title={"train": "training", "validation": "validation, first windows"}[split])
        plain(axes)
    for name, bits in record["baselines"]["validation"].items():
        panels[1].axhline(bits, color=QUIET, lw=0.8, ls="--", zorder=0)
        place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "right", "fontsize": 8, "color": QUIET}
        panels[1].annotate(name, (1, bits), xycoords=("axes fraction", "data"), **place)
    panels[0].set(ylabel="bits per byte", yscale="log")
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    panels[0].legend(frameon=False, fontsize=8)
    return png(figure)
