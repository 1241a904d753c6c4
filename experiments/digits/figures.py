"""The pictures of a report, as PNG files in memory."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments.common.figures import plain, png
from experiments.digits.data import SIDE

BEFORE, AFTER, OTHER = "#a9afb9", "#1f5fa8", "#d9822b"
PER_LAYER = 3


class Kernels(NamedTuple):
    """The kernels of all layers at one time, (layers, C, D, K), as stored and as the convolution uses them."""

    when: str
    before: np.ndarray
    after: np.ndarray


def kernels(stages: Sequence[Kernels], threshold: float) -> bytes:
    """Some kernels by lag, at each stage; the band holds the taps that squashing sets to zero."""

    def draw(axes: Axes, before: np.ndarray, after: np.ndarray) -> str:
        axes.axhspan(-threshold, threshold, color=OTHER, alpha=0.45, lw=0, zorder=3)
        axes.plot(before, color=BEFORE, lw=0.9)
        axes.plot(after, color=AFTER, lw=0.7)
        axes.set(xlim=(0, len(before) - 1), xticks=range(0, len(before) + 1, 8 * SIDE))
        return f"{np.mean(after != 0):.0%} alive"

    title = f"kernels by lag, {SIDE} pixels to an image row; taps within the band of ±{threshold} are squashed to zero"
    return _panels(stages, draw, title, x="lag (pixels)", y="tap")


def spectra(stages: Sequence[Kernels]) -> bytes:
    """The magnitude spectra of the same kernels, in decibels below the peak before squashing."""

    def draw(axes: Axes, before: np.ndarray, after: np.ndarray) -> str:
        magnitudes = [np.abs(np.fft.rfft(kernel)) for kernel in (before, after)]
        peak = magnitudes[0].max()
        for magnitude, colour, width in zip(magnitudes, (BEFORE, AFTER), (0.9, 0.7), strict=True):
            axes.plot(20 * np.log10(np.maximum(magnitude / peak, 1e-4)), color=colour, lw=width)
        axes.axvline(SIDE, color=OTHER, lw=1, ls=":", zorder=0)
        axes.set(xlim=(0, len(before) // 2), xticks=range(0, len(before) // 2 + 1, 4 * SIDE), ylim=(-50, 3))
        return ""

    title = f"magnitude spectra of the same kernels; the dotted line is one cycle to an image row of {SIDE} pixels"
    return _panels(stages, draw, title, x="cycles per sequence", y="dB")


def _panels(
    stages: Sequence[Kernels], draw: Callable[[Axes, np.ndarray, np.ndarray], str], title: str, *, x: str, y: str
) -> bytes:
    """One row of panels for each layer and stage, of the kernels that are strongest in the end, one to a feature."""
    layers, _, features, _ = stages[-1].after.shape
    energy = np.square(stages[-1].after).sum(-1)
    rows = [(layer, stage) for layer in range(layers) for stage in stages]
    height = 1.9 * len(rows) + 0.7
    top = 1 - 0.42 / height
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, top), h_pad=0.06)
    figure = Figure(figsize=(13, height), dpi=130, layout=layout)
    grid = figure.subplots(len(rows), PER_LAYER, squeeze=False, sharex=True)
    for axes_of_row, (layer, stage) in zip(grid, rows, strict=True):
        strongest = np.argsort(-energy[layer].max(axis=0))[:PER_LAYER]
        for axes, feature in zip(axes_of_row, strongest, strict=False):
            channel = energy[layer, :, feature].argmax()
            remark = draw(axes, stage.before[layer, channel, feature], stage.after[layer, channel, feature])
            label = f"layer {layer + 1}, feature {feature}, channel {channel}, {stage.when}"
            axes.set_title(", ".join(filter(None, [label, remark])), fontsize=8, loc="left")
            plain(axes)
        for axes in axes_of_row[features:]:
            axes.set_axis_off()
        axes_of_row[0].set_ylabel(y, fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel(x, fontsize=9)
    for position, text, colour, side in (
        (0.008, title, "black", "left"),
        (0.875, "before", BEFORE, "right"),
        (0.992, "after squashing", AFTER, "right"),
    ):
        figure.text(position, (1 + top) / 2, text, color=colour, ha=side, va="center", fontsize=11)
    return png(figure)
