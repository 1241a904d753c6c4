"""What a run looks like: learning curves from its metrics.

    python -m experiments.common.figures WORKDIR

draws them into WORKDIR/learning_curves.png, also while the run goes on. A run that ends does so by itself.
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.workdir import Row, write_whole

COLOURS = {"train": "#d9822b", "validation": "#7a9e3f", "test": "#1f5fa8"}
QUIET = "#6d737c"


def learning_curves(rows: Sequence[Row], target: float | None = None) -> bytes:
    """Loss and accuracy of each split against the epoch, a PNG, from the rows of metrics.jsonl.

    Args:
      rows: of one run.
      target: an accuracy to mark.
    """
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    quantities = [name for name in ("loss", "accuracy") if any(name in row for row in rows)]
    for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        for split in dict.fromkeys(row["split"] for row in rows):
            points = [(row["epoch"], row[quantity]) for row in rows if row["split"] == split and quantity in row]
            few = {"marker": "o", "ms": 3.5} if len(points) <= 60 else {"lw": 0.8}
            axes.plot(*zip(*points, strict=True), color=COLOURS.get(split), label=split, **few)
        axes.set(xlabel="epoch", title=quantity)
        axes.legend(frameon=False)
        plain(axes)
        if quantity == "loss":
            losses = [row["loss"] for row in rows]
            if max(losses) > 10 * min(losses) > 0:
                axes.set_yscale("log")
            continue
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if target is not None:
            axes.axhline(target, color=QUIET, lw=1, ls="--", zorder=0)
            first = rows[0]["epoch"]
            axes.annotate(f"target {target:.0%}", (first, target), (0, 3), textcoords="offset points", color=QUIET)
            axes.set_ylim(top=1.02)
    return png(figure)


def plain(axes: Axes) -> None:
    """Without a box around it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def png(figure: Figure) -> bytes:
    """The figure as a file in memory."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw(workdir: Path) -> Path:
    """Draws the learning curves of a run into its folder.

    Raises:
      ValueError: if it has no rows of metrics, or is none.
    """
    file = workdir / "metrics.jsonl"
    try:
        lines = file.read_bytes().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last one may be half written
        target = learning_curves(rows) if rows else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"workdir must be the folder of a run, with its metrics.jsonl; got {workdir} ({error})."
        ) from error
    if target is None:
        raise ValueError(f"{file} has no rows yet.")
    write_whole(workdir / "learning_curves.png", target)
    return workdir / "learning_curves.png"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.common.figures", description="Draws learning curves.")
    parser.add_argument("workdir", type=Path, nargs="+", help="folder of a run")
    for workdir in parser.parse_args().workdir:
        try:
            print(f"wrote {draw(workdir)}")
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
