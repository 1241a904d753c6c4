"""Pictures of samples, as PNG files in memory."""

import functools
import textwrap

import numpy as np
from matplotlib.figure import Figure

from experiments.common.figures import QUIET, png
from experiments.data.samples import Pictures, Samples, Series, Texts

_COLUMNS = 4
_LINES = 5  # of a text
_CHARACTERS = 150  # of a line


@functools.singledispatch
def draw(samples: Samples, title: str) -> bytes:
    """A contact sheet, excerpts, or plots, according to the form of the samples."""
    raise TypeError(f"samples must be Pictures, Texts or Series; got {type(samples).__name__}.")


@draw.register
def _(samples: Pictures, title: str) -> bytes:
    rows = -(-len(samples.images) // _COLUMNS)
    height, width = samples.images.shape[1:3]
    inches = max(1.6, height / 100)
    figure = Figure(figsize=(_COLUMNS * inches * width / height, rows * (inches + 0.3) + 0.6), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes in grid:
        axes.axis("off")
    for axes, image, label in zip(figure.axes, samples.images, samples.labels, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(label, fontsize=8)
    return _titled(figure, samples, title)


@draw.register
def _(samples: Texts, title: str) -> bytes:
    line, gap, above = 0.16, 0.18, 0.7  # inches
    excerpts = [_excerpt(text) for text in samples.texts]
    height = above + sum(len(lines) * line + gap for lines in excerpts)
    figure = Figure(figsize=(11, height))
    y = height - above
    for lines, label, text in zip(excerpts, samples.labels, samples.texts, strict=True):
        figure.text(0.02, y / height, label, va="top", fontsize=10, weight="bold")
        figure.text(0.02, (y - line) / height, f"{len(text):,}", va="top", fontsize=6, color=QUIET)
        figure.text(0.1, y / height, "\n".join(lines), va="top", fontsize=7.5, family="monospace", parse_math=False)
        y -= len(lines) * line + gap
    return _titled(figure, samples, title)


@draw.register
def _(samples: Series, title: str) -> bytes:
    rows = len(samples.values)
    figure = Figure(figsize=(10, 1.7 * rows + 0.8), layout="constrained")
    for pair, values, label, step in zip(
        figure.subplots(rows, 2, squeeze=False), samples.values, samples.labels, samples.seconds, strict=True
    ):
        end = step * len(values)
        scale = float(np.quantile(np.abs(values), 0.99)) or 1.0
        pair[0].imshow(
            values.T, cmap="gray", aspect="auto", vmin=-scale, vmax=scale, extent=(0, end, values.shape[1], 0)
        )
        pair[0].set_ylabel("channel", fontsize=7)
        for offset, channel in enumerate(np.linspace(0, values.shape[1] - 1, min(4, values.shape[1])).astype(int)):
            pair[1].plot(step * np.arange(len(values)), values[:, channel] / scale - 2 * offset, lw=0.7)
        pair[1].set(xlim=(0, end), yticks=[])
        for axes in pair:
            axes.set_title(label, fontsize=8)
            axes.tick_params(labelsize=7)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("seconds", fontsize=8)
    return _titled(figure, samples, title)


def _excerpt(text: str) -> list[str]:
    shown = "".join(character if character.isprintable() else " " for character in text[: 2 * _LINES * _CHARACTERS])
    lines = textwrap.wrap(shown, _CHARACTERS)
    return [*lines[: _LINES - 1], lines[_LINES - 1][: _CHARACTERS - 4] + " ..."] if len(lines) >= _LINES else lines


def _titled(figure: Figure, samples: Samples, title: str) -> bytes:
    figure.suptitle(f"{title} · {samples.source}", fontsize=10, parse_math=False)
    return png(figure)
