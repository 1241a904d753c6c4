"""Measures how many examples a second each loader gives here: `python -m experiments.data.throughput --help`.

A loader is measured twice: alone, which is indexing, decoding, shuffling and stacking batches in one thread, by the
time of the core that it had, so that other programs beside it do not count; and as in training, where threads do that
and copy batches to the device, by the clock.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grain
import jax
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from experiments.common import data
from experiments.data import registry
from pallas_kernels.records import package_versions, write_atomically

# Of the tasks of `experiments.lra.step_times`, where they have other names.
_STEP_TASKS = {"pathfinder32": "pathfinder"}


@dataclass(frozen=True)
class Throughput:
    """Measure how many examples a second each loader gives on this machine, beside what training steps take.

    Rows are generated or made up; those of Path-X and Path256 are written to a temporary folder first and read from
    there, as in training.
    """

    tasks: tuple[str, ...] = tuple(registry.SOURCES)
    """Whose loaders."""

    seconds: float = 2.0
    """For each of the two measurements of a loader."""

    out: Path | None = None
    """A JSON file for the results."""

    step_times: tuple[Path, ...] = ()
    """Files step_times.json that `python -m experiments.lra.step_times` wrote on a GPU."""


@dataclass(frozen=True)
class Row:
    """Of one loader."""

    task: str
    batch_size: int
    alone: float
    """Examples of one thread in a second of a core."""
    in_training: float
    """Examples a second of the training loop's threads, which copy them to the device."""
    needed: float | None
    """Examples a second of the fastest measured training step; None is not measured."""
    needed_by: str | None
    """That step: device, implementation and dtype."""


def measure(options: Throughput, console: Console) -> list[Row]:
    """A row for each task.

    Raises:
      ValueError: for unknown tasks, no time, or files that are not step times.
    """
    unknown = [task for task in options.tasks if task not in registry.SOURCES]
    if unknown or not options.tasks:
        raise ValueError(f"tasks must be among {', '.join(registry.SOURCES)}; got {', '.join(unknown) or 'none'}.")
    if not 0.01 <= options.seconds <= 600:
        raise ValueError(f"seconds must be from 0.01 to 600; got {options.seconds}.")
    needs = needed(options.step_times)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for task in options.tasks:
            loading = registry.SOURCES[task]
            console.print(f"{task} ...", soft_wrap=True)
            source = registry.source(task)(Path(folder), loading.rows)
            examples = grain.MapDataset.source(source).seed(0).shuffle()
            need, by = needs.get(_STEP_TASKS.get(task, task), (None, None))
            alone = _alone(examples, loading.batch_size, options.seconds)
            in_training = _in_training(examples, loading.batch_size, options.seconds)
            rows.append(Row(task, loading.batch_size, round(alone), round(in_training), need, by))
    return rows


def _alone(examples: grain.MapDataset, batch_size: int, seconds: float) -> float:
    batches = examples.repeat().batch(batch_size)
    return batch_size * _rate((batches[number] for number in range(2**30)), seconds, time.thread_time)


def _in_training(examples: grain.MapDataset, batch_size: int, seconds: float) -> float:
    mesh = jax.make_mesh((1,), ("batch",), devices=jax.devices()[:1])
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    with data.reading_ahead(data.training_batches(examples, batch_size, sharding)) as batches:
        return batch_size * _rate(map(jax.block_until_ready, batches), seconds, time.perf_counter)


def _rate(things: Iterable[Any], seconds: float, clock: Callable[[], float]) -> float:
    """How many a second of this clock, after the first few: those that were read ahead are not counted."""
    iterator = iter(things)
    for _ in range(2 * data.READ_AHEAD):
        next(iterator)
    start, count = clock(), 0
    while (elapsed := clock() - start) < seconds:
        next(iterator)
        count += 1
    return count / elapsed


def needed(files: Sequence[Path]) -> dict[str, tuple[float, str]]:
    """By task, the examples a second of the fastest step of long convolutions in these files, and which step it is.

    Raises:
      ValueError: if a file is not one of step times.
    """
    fastest: dict[str, tuple[float, str]] = {}
    for file in files:
        try:
            content = json.loads(file.read_text())
            if content["tiny"]:
                raise ValueError("they are of models of a few features")
            for row in content["rows"]:
                rate = row["examples_per_second"]
                if row["architecture"] == "long_conv" and rate is not None:
                    by = f"{content['device']}, {row['implementation']}, {row['dtype']}"
                    fastest[row["task"]] = max(fastest.get(row["task"], (0.0, "")), (float(rate), by))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"step_times must be files that python -m experiments.lra.step_times wrote; got {file} ({error})."
            ) from error
    return fastest


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    shown = Table("task", "batch", "alone, one core", "in training", "a step needs", "which step")
    for row in rows:
        need = "not measured" if row.needed is None else f"{row.needed:,.0f}"
        shown.add_row(
            row.task, f"{row.batch_size}", f"{row.alone:,.0f}", f"{row.in_training:,.0f}", need, row.needed_by or ""
        )
    return shown


def record(options: Throughput, rows: Sequence[Row]) -> dict[str, Any]:
    """The results, and on what they were measured."""
    return {
        "unit": "examples per second",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "device": jax.devices()[0].device_kind,
        "versions": package_versions(("grain", "jax", "numpy", "tensorflow-datasets")),
        "seconds": options.seconds,
        "rows": [vars(row) for row in rows],
    }


def main() -> None:
    console = Console()
    try:
        options = tyro.cli(Throughput, prog="python -m experiments.data.throughput")
        rows = measure(options, console)
        console.print(table(rows))
        console.print(f"examples per second; load of the machine's {os.cpu_count()} cores: {os.getloadavg()[0]:.1f}")
        if options.out is not None:
            try:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(options.out, json.dumps(record(options, rows), indent=1) + "\n")
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(f"out must be a file that can be written; got {options.out} ({reason}).") from error
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
