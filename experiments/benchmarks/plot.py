"""Draws milliseconds over the length, with the two floors, one panel for each dtype, direction and gating."""

import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from experiments.benchmarks.record import Record, Row

# Okabe and Ito's colours, which colour-blind readers can tell apart; ours are the saturated ones.
STYLES = {
    "mosaic_gpu": ("#D55E00", "o", "ours: fused butterfly kernel"),
    "triton": ("#882255", "p", "ours: butterfly in Triton"),
    "xla": ("#0072B2", "s", "ours: xla"),
    "butterfly": ("#CC79A7", "D", "ours: butterfly in jnp"),
    "jnp_fft": ("#000000", "^", "jnp.fft under jit"),
    "torch_real": ("#009E73", "v", "PyTorch, real FFT"),
    "torch_complex": ("#999999", "<", "PyTorch, complex FFT"),
    "flashfftconv": ("#E69F00", "P", "FlashFFTConv"),
    "cudnn": ("#56B4E9", "X", "cuDNN fft_causal_conv1d"),
}


def draw(record: Record, path: Path) -> None:
    """Writes the figure; nothing where no row was measured."""
    measured = [row for row in record.rows if row.ms is not None and row.status == "measured"]
    if not measured:
        return
    panels = list(dict.fromkeys(row.case[:4] for row in measured))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2 * columns + 0.6, 3.9 * lines + 1.3), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, panels, strict=False):
            _panel(axis, [row for row in measured if row.case[:4] == panel])
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        rows = _rows(measured[0])
        figure.suptitle(
            f"Long convolution of {rows:,} rows on {record.device}, {record.date[:10]}", fontsize=12, weight="bold"
        )
        figure.legend(handles=_handles(measured), loc="outside lower center", ncols=min(4, 2 * columns), frameon=False)
        figure.savefig(path, dpi=160, facecolor="white")


def _panel(axis: Axes, rows: list[Row]) -> None:
    protocol, dtype, direction, gated, _ = rows[0].case
    axis.set(xscale="log", yscale="log", xlabel="length L", ylabel="milliseconds, transform of the kernel included")
    axis.set_title(f"{protocol}, {dtype}, {direction}{', gated' if gated else ''}", loc="left", fontsize=10)
    axis.grid(visible=True, which="major", color="#E6E6E6", linewidth=0.6)
    floors = {
        r.length: (r.memory_floor_ms, r.tensor_floor_ms)
        for r in sorted(rows, key=lambda row: row.length)
        if r.memory_floor_ms is not None and r.tensor_floor_ms is not None
    }
    if floors:
        memory, tensor = zip(*floors.values(), strict=True)
        axis.plot(list(floors), memory, color="#555555", linestyle="--", linewidth=1.2, zorder=1.5)
        axis.plot(list(floors), tensor, color="#555555", linestyle=":", linewidth=1.6, zorder=1.5)
    for name in STYLES:
        line = sorted((row for row in rows if row.implementation == name), key=lambda row: row.length)
        if not line:
            continue
        color, marker, _ = STYLES[name]
        points = [(row.length, row.ms) for row in line if row.ms is not None]
        axis.plot(*zip(*points, strict=True), color=color, linewidth=2.4 if name == "mosaic_gpu" else 1.4, zorder=3)
        for row, point in zip(line, points, strict=True):
            face = color if row.scaled_rows is None else "white"
            axis.plot(*point, marker, color=color, markerfacecolor=face, markersize=5.5, zorder=4)
    lengths = sorted({row.length for row in rows})
    axis.set_xticks(lengths, [_short(n) for n in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    if floors:  # what lies under the higher floor cannot be
        bottom = axis.get_ylim()[0]
        highest = [max(pair) for pair in floors.values()]
        axis.fill_between(list(floors), highest, bottom, color="#555555", alpha=0.08, linewidth=0)
        axis.set_ylim(bottom=bottom)


def _handles(rows: Iterable[Row]) -> list[Line2D]:
    rows = list(rows)
    used = {row.implementation for row in rows}
    handles = [
        Line2D([], [], color=color, marker=marker, linewidth=2.4 if name == "mosaic_gpu" else 1.4, label=label)
        for name, (color, marker, label) in STYLES.items()
        if name in used
    ]
    if any(row.memory_floor_ms is not None for row in rows):
        handles.append(Line2D([], [], color="#555555", linestyle="--", label="memory floor"))
        handles.append(Line2D([], [], color="#555555", linestyle=":", linewidth=1.6, label="tensor-core floor"))
    if any(row.scaled_rows is not None for row in rows):
        note = "hollow: smaller batch, scaled"
        handles.append(
            Line2D([], [], color="#555555", marker="o", markerfacecolor="white", linestyle="none", label=note)
        )
    return handles


def _rows(row: Row) -> int:
    return row.scaled_rows or (row.batch or 0) * (row.features or 0)


def _short(length: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)
