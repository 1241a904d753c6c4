"""The step times as tables for people, beside the ratios that the paper states."""

import math
from collections.abc import Sequence
from typing import Any

from experiments.lra.step_times.cases import LONG_RANGE_ARENA
from experiments.lra.step_times.measure import Row
from experiments.report.published import speeds


def markdown(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """The page."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [f"# A training step of each paper recipe\n\n{about['device']}; {versions}."]
    if about["tiny"]:
        parts.append("**Tiny models, to try the program: the times mean nothing.**")
    parts += [times(rows), *ratios(rows)]
    if without := [row for row in rows if row.ms is None]:
        parts.append("Without a time:\n\n" + "\n".join(f"- {'/'.join(row.key)}: {row.reason}" for row in without))
    return "\n\n".join(parts) + "\n"


def times(rows: Sequence[Row]) -> str:
    """All that was measured."""
    header = ["task", "batch × L", "model", "implementation", "dtype", "ms", "examples/s", "epoch, h", "memory, GB"]
    lines = [header, ["---"] * 5 + ["---:"] * 4]
    for row in rows:
        if row.ms is None or row.examples_per_second is None or row.epoch_hours is None:
            continue
        memory = "not known" if row.step_bytes is None else f"{row.step_bytes / 1e9:.2f}"
        lines.append(
            [
                row.task,
                f"{row.batch} × {row.length:,}",
                row.architecture,
                f"`{row.implementation}`",
                row.dtype,
                f"{row.ms:.2f}",
                f"{row.examples_per_second:,.1f}",
                f"{row.epoch_hours:.3g}",
                memory,
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratios(rows: Sequence[Row]) -> list[str]:
    """How many times faster the fastest long convolutions are than each Transformer, by task and on average."""
    header = ["task", "long convolutions over"]
    lines: list[list[str]] = []
    for implementation, dtype in (("xla", "float32"), ("xla", "bfloat16"), ("cudnn", "bfloat16")):
        found = {
            task: over_transformer(rows, task, implementation, dtype) for task in dict.fromkeys(r.task for r in rows)
        }
        measured = {task: ratio for task, ratio in found.items() if ratio is not None}
        label = f"a Transformer, `{implementation}`, {dtype}"
        lines += [[task, label, f"{ratio:.2f}"] for task, ratio in measured.items()]
        arena = [ratio for task, ratio in measured.items() if task in LONG_RANGE_ARENA]
        if len(arena) > 1:
            mean = math.prod(arena) ** (1 / len(arena))
            lines.append([f"**geometric mean of {len(arena)} of the arena's tasks**", label, f"**{mean:.2f}**"])
    if not lines:
        return []
    table = "\n".join(
        f"| {' | '.join(line)} |" for line in [[*header, "times as fast"], ["---", "---", "---:"], *lines]
    )
    published = "; ".join(f"{one.what}, {one.model}: {one.factor:g} [{one.tag}]" for one in speeds())
    explained = (
        "The Transformer is as wide and as deep as the recipe, and has its batch; of the long convolutions the fastest "
        f"measured ones count. Published, with other code on other GPUs: {published}. [A] is the paper's abstract, "
        "[B] a secondary source, [R] recalled, unconfirmed."
    )
    return [table, explained]


def over_transformer(rows: Sequence[Row], task: str, implementation: str, dtype: str) -> float | None:
    """The step time of a Transformer over that of the fastest long convolutions."""
    mine = [row.ms for row in rows if row.task == task and row.architecture == "long_conv" and row.ms is not None]
    key = (task, "transformer", implementation, dtype)
    its = [row.ms for row in rows if row.key == key and row.ms is not None]
    return its[0] / min(mine) if mine and its else None
