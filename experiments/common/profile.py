"""Where the time of the steps that `--profile-steps` traced went.

    python -m experiments.lra.train --preset small --workdir W --profile-steps 20 23
    python -m experiments.common.profile W --steps 4

prints the operations that took the devices the longest. The trace itself, for TensorBoard or Perfetto, is in W/profile.
"""

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Profile(NamedTuple):
    """Microseconds and calls of each operation, over all devices or, on a CPU, all threads."""

    microseconds: Counter[str]
    calls: Counter[str]


def read(workdir: Path) -> Profile:
    """The latest trace of a run.

    Raises:
      ValueError: if there is none, or none that can be read.
    """
    traces = sorted((workdir / "profile").rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise ValueError(f"workdir must be the folder of a run with --profile-steps; got {workdir}, without a trace.")
    try:
        with gzip.open(traces[-1]) as file:
            return operations(json.load(file)["traceEvents"])
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{traces[-1]} is no trace that can be read ({error}).") from error


def operations(events: list[dict]) -> Profile:
    """Of the streams of GPUs, or without any, of the threads that run XLA's operations on a CPU."""
    names: dict[tuple, str] = {}
    for event in events:
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name"):
            names[event["pid"], event.get("tid") if event["name"] == "thread_name" else None] = event["args"]["name"]
    timed = [event for event in events if event.get("ph") == "X"]
    on_gpus = [
        event
        for event in timed
        if "GPU" in names.get((event["pid"], None), "") and "Stream" in names.get((event["pid"], event.get("tid")), "")
    ]
    # On a CPU only XLA's own operations say to which of them they belong.
    chosen = on_gpus or [event for event in timed if "hlo_op" in event.get("args", {})]
    profile = Profile(Counter(), Counter())
    for event in chosen:
        profile.microseconds[event["name"]] += event["dur"]
        profile.calls[event["name"]] += 1
    return profile


def table(profile: Profile, steps: int, rows: int) -> Table:
    """The longest operations for each step."""
    total = sum(profile.microseconds.values())
    result = Table()
    for name in ("ms", "share", "calls", "operation"):
        result.add_column(name, justify="left" if name == "operation" else "right", no_wrap=name != "operation")
    for name, microseconds in profile.microseconds.most_common(rows):
        calls = f"{profile.calls[name] / steps:g}"
        result.add_row(f"{microseconds / steps / 1e3:.3f}", f"{microseconds / total:.1%}", calls, name)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.common.profile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("workdir", type=Path, help="folder of a run with --profile-steps")
    parser.add_argument("--steps", type=int, default=1, help="that were traced, to divide by (default: 1)")
    parser.add_argument("--rows", type=int, default=20, help="operations to list (default: 20)")
    options = parser.parse_args()
    steps = options.steps
    for name in ("steps", "rows"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(options, name)}")
    try:
        profile = read(options.workdir)
        print(f"{sum(profile.microseconds.values()) / steps / 1e3:.3f} ms of operations for each of {steps} steps")
        Console().print(table(profile, steps, options.rows))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
