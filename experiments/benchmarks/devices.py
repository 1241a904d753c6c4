"""Times the convolution over several devices, with its error against float64.

    python -m experiments.benchmarks.devices --devices 1 2 4 --lengths 65536 1048576

The same whole arrays on one device and spread over P of them: by their batch, by their features, by both, or by their
steps, which is `fb.long_conv_on_mesh` with either split. On GPUs each device runs the fused kernel, but by frequencies,
where there is only XLA's transform. Inputs are drawn in place, already spread; times are medians over rounds of queued
calls. "sent" is what each device sends, and its rate is over the whole call: the links are at least as fast. A machine
without GPUs pretends to have eight devices on its cores, at small sizes: that shows right values, and no speed. Written
after every row: `devices_DEVICE_DATE.json`. Needs the package and rich.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.cases import (
    DIRECTIONS,
    DTYPES,
    PROTOCOLS,
    Case,
    Direction,
    Dtype,
    Inputs,
    Protocol,
    reference,
    relative_errors,
)
from experiments.benchmarks.record import WRONG, Record, Status, finite, here
from experiments.benchmarks.spreads import SPREADS, Spread, Way, sampled, sent_bytes
from experiments.benchmarks.text import first_line, positive, slug
from pallas_kernels.records import write_atomically
from pallas_kernels.timing import Effort, host_round, seconds_per_call

GPU_LENGTHS, CPU_LENGTHS = (8192, 65536, 1048576), (1024, 4096)
MOST_NUMBERS = {"gpu": 2**30, "cpu": 2**19}
"""B D L at most, unless a batch is named: one device has to hold them all as well."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One convolution, spread in one way over so many devices."""

    devices: int
    spread: Spread
    implementation: str
    protocol: Protocol
    length: int
    batch: int
    features: int
    dtype: Dtype
    direction: Direction
    status: Status
    reason: str | None = None
    ms: float | None = None
    ms_quartiles: tuple[float, float] | None = None
    speedup: float | None = None
    """Over one device with the implementation that is first choice there, in the same run."""
    errors: dict[str, float] | None = None
    """Relative L2 error against float64 of y and of each gradient, of three features chosen at random."""
    difference: float | None = None
    """The largest relative L2 difference of these results from those of that device."""
    sent_bytes: float | None = None
    """What each device sends in a call."""
    sent_bytes_per_second: float | None = None

    @property
    def error(self) -> float | None:
        """The largest of the errors."""
        return max(self.errors.values()) if self.errors else None


class Bench:
    """One case, spread in every way asked for."""

    def __init__(self, case: Case, ways: Sequence[Way], effort: Effort, threads: int):
        self.case, self.effort = case, effort
        self.one: tuple[dict[str, np.ndarray], float] | None = None
        chosen = np.random.default_rng(case.length).choice(case.features, min(3, case.features), replace=False)
        self.features = np.sort(chosen)
        self.known: tuple[Any, dict[str, np.ndarray]] | None = None
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        self.compiling = {}
        for way in ways:  # lowered one by one, and compiled at once
            try:
                if reason := way.refusal(case):
                    raise NotImplementedError(reason)
                lowered = way.lowered(case), way.lowered_draw(case)
                self.compiling[way] = pool.submit(lambda programs: [each.compile() for each in programs], lowered)
            except Exception as error:  # told in the row
                self.compiling[way] = concurrent.futures.Future()
                self.compiling[way].set_exception(error)
        concurrent.futures.wait(self.compiling.values())
        pool.shutdown()

    def row(self, way: Way) -> Row:
        """Measures, or says why not."""
        try:
            return self.measure(way)
        except NotImplementedError as error:
            return absent(way, self.case, "unsupported", first_line(error))
        except Exception as error:  # the others are still worth measuring
            return absent(way, self.case, "failed", f"{type(error).__name__}: {first_line(error)}")

    def measure(self, way: Way) -> Row:
        case = self.case
        compiled, drawn = self.compiling[way].result()
        inputs = jax.block_until_ready(drawn())
        results = {name: sampled(x, self.features) for name, x in compiled(inputs).items()}
        errors = relative_errors(results, self.expected(inputs))
        if not finite(errors):
            return absent(way, case, "wrong", "the result is not finite")
        wrong = max(errors.values()) > WRONG
        seconds = seconds_per_call(host_round(compiled, [inputs], jax.block_until_ready), self.effort)
        low, median, high = (float(x) for x in np.percentile(1e3 * seconds, [25, 50, 75]))
        if way.spread == "one" and self.one is None and not wrong:
            self.one = results, median
        sent = sent_bytes(way, case, compiled.as_text())
        return dataclasses.replace(
            absent(way, case, "wrong" if wrong else "measured", None),
            reason=f"relative error {max(errors.values()):.2g}" if wrong else None,
            ms=median,
            ms_quartiles=(low, high),
            speedup=self.one and self.one[1] / median,
            errors=errors,
            difference=self.one and max(relative_errors(results, self.one[0]).values()),
            sent_bytes=sent,
            sent_bytes_per_second=sent / (median * 1e-3),
        )

    def expected(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """The results in float64; computed anew only for inputs that are not, to the bit, those seen before."""
        mine: Any = {name: sampled(x, self.features) for name, x in inputs.items()}
        if self.known is None or any(not np.array_equal(x, self.known[0][name]) for name, x in mine.items()):
            self.known = mine, reference(dataclasses.replace(self.case, features=len(self.features)), mine)
        return self.known[1]


def absent(way: Way, case: Case, status: Status, reason: str | None) -> Row:
    return Row(
        devices=way.devices,
        spread=way.spread,
        implementation=way.implementation,
        protocol=case.protocol,
        length=case.length,
        batch=case.batch,
        features=case.features,
        dtype=case.dtype,
        direction=case.direction,
        status=status,
        reason=reason,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    started = time.perf_counter()
    gpu = jax.default_backend() == "gpu"
    settings = parse(argv, gpu=gpu, most=len(jax.devices()))
    if not gpu:
        print("no GPU: these are devices that one CPU pretends to be; their times say nothing of GPUs", file=sys.stderr)
    effort = Effort(repeats=5, round_seconds=0.02, limit_seconds=0.5) if settings.quick else Effort()
    record = here({key: value for key, value in vars(settings).items() if key != "out"})
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / f"{'_'.join(['devices', slug(record.device), record.date[:19].replace(':', '')])}.json"
    rows: list[Row] = []
    for case, ways in cases(settings, gpu=gpu):
        late = time.perf_counter() - started > settings.seconds
        bench = None if late else Bench(case, ways, effort, settings.threads)
        for way in ways:
            if bench is None or time.perf_counter() - started > settings.seconds:
                row = absent(way, case, "not measured", f"the {settings.seconds:g} s for the whole run were over")
            else:
                row = bench.row(way)
            rows.append(row)
            fields = dataclasses.asdict(record) | {"rows": [dataclasses.asdict(each) for each in rows]}
            write_atomically(path, json.dumps(fields, indent=1, allow_nan=False) + "\n")
            print(f"{time.perf_counter() - started:.0f} s: {progress(row)}", file=sys.stderr, flush=True)
    show(record, rows, gpu=gpu)
    print(f"wrote {path}")
    if wrong := [row for row in rows if row.status == "wrong"]:
        raise SystemExit(f"these are not the convolution: {'; '.join(map(progress, wrong))}")


def parse(argv: Sequence[str] | None, *, gpu: bool, most: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.devices", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    powers = [2**i for i in range(most.bit_length())]
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--devices", type=positive, **several, help="numbers of devices; default: 1, 2, 4 .. all")
    parser.add_argument("--lengths", type=positive, **several, default=list(GPU_LENGTHS if gpu else CPU_LENGTHS))
    parser.add_argument("--spreads", choices=SPREADS, **several, default=list(SPREADS), help="what is dealt out")
    parser.add_argument("--protocols", choices=PROTOCOLS, **several, help="default: both; causal if quick")
    parser.add_argument("--directions", choices=DIRECTIONS, **several, default=list(DIRECTIONS))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if gpu else "float32")
    parser.add_argument("--features", type=positive, help="default on GPUs: 768, and 96 of more than 2^18 steps")
    parser.add_argument("--batch", type=positive, help="default: at most 64, as many as one device holds")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"), help="folder for the JSON")
    parser.add_argument("--seconds", type=float, help="start no row after so long; default: 70 if quick")
    parser.add_argument("--threads", type=positive, default=8, help="programs of one case that are compiled at once")
    parser.add_argument("--quick", action="store_true", help="one and all devices, causal, few short rounds")
    settings = parser.parse_args(argv)
    settings.devices = sorted(set(settings.devices or ({1, powers[-1]} if settings.quick else powers)))
    if settings.devices[-1] > most:
        parser.error(f"--devices must be at most {most}, as many as there are; got {settings.devices[-1]}")
    settings.protocols = settings.protocols or list(PROTOCOLS[: 1 if settings.quick else None])
    if settings.seconds is None:
        settings.seconds = 70.0 if settings.quick else 1e9
    return settings


def cases(settings: argparse.Namespace, *, gpu: bool) -> Iterator[tuple[Case, list[Way]]]:
    """Every case with the ways to spread it, one device first. The length varies fastest."""
    first = "mosaic_gpu" if gpu else "xla"
    for protocol in settings.protocols:
        for direction in settings.directions:
            for length in settings.lengths:
                features = settings.features or (16 if not gpu else 768 if length <= 2**18 else 96)
                batch = settings.batch or batch_that_fits(features * length, MOST_NUMBERS["gpu" if gpu else "cpu"])
                ways = [Way("one", 1, name) for name in dict.fromkeys((first, "xla"))] if 1 in settings.devices else []
                for devices in settings.devices:
                    for spread in settings.spreads:
                        if spread == "one" or devices == 1 or (spread == "data and feature" and devices % 2):
                            continue
                        if spread == "data and feature" and devices == 2:
                            continue  # one of the two axes would be of one device: it is among the others
                        ways.append(Way(spread, devices, "xla" if spread == "by frequencies" else first))
                yield Case(protocol, length, settings.dtype, direction, False, batch, features), ways


def batch_that_fits(numbers: int, most: int) -> int:
    """The largest power of two, at most 64, of so many numbers each."""
    return max(1, min(64, 2 ** int(math.log2(max(1, most // numbers)))))


def progress(row: Row) -> str:
    result = row.reason if row.ms is None else f"{row.ms:.4g} ms"
    case = f"{row.protocol}, {row.direction}, L = {row.length:,}, P = {row.devices}, {row.spread}, {row.implementation}"
    return f"{case}: {row.status}, {result}"


def show(record: Record, rows: Sequence[Row], *, gpu: bool) -> None:
    """Prints a table of what was measured, and a line for each row that was not."""
    console = Console(width=130, highlight=False)
    where = record.device if gpu else f"{record.device}, pretending to be several: says nothing of GPUs"
    table = Table(
        title=f"Long convolution over devices, {where}, {record.settings['dtype']}, jax {record.versions['jax']}, "
        f"{record.date[:10]}",
        caption="speedup: over the first row of each case. sent: by each device in a call; GB/s over the whole "
        "call. error: largest relative L2 error of y and gradients against float64; from one: how far they are from "
        "one device's.",
        box=None,
        padding=(0, 1),
    )
    for column in ["P", "spread", "implementation", "B", "D", "ms", "speedup", "sent, MB", "GB/s", "error", "from one"]:
        table.add_column(column, justify="left" if column in ("spread", "implementation") else "right", no_wrap=True)
    heading = None
    for row in rows:
        if row.ms is None:
            continue
        if heading != (heading := f"{row.protocol}, {row.direction}, L = {row.length:,}"):
            table.add_row("", f"[bold]{heading}[/bold]")
        table.add_row(
            str(row.devices),
            row.spread + (" (wrong)" if row.status == "wrong" else ""),
            row.implementation,
            str(row.batch),
            str(row.features),
            f"{row.ms:.4g}",
            f"{row.speedup:.2f}" if row.speedup else "",
            f"{row.sent_bytes / 1e6:.4g}" if row.sent_bytes else "",
            f"{row.sent_bytes_per_second / 1e9:.3g}" if row.sent_bytes_per_second else "",
            "" if row.error is None else f"{row.error:.1e}",
            "" if row.difference is None else f"{row.difference:.1e}",
        )
    console.print(table)
    for row in rows:
        if row.status != "measured":
            console.print(progress(row), soft_wrap=True)


if __name__ == "__main__":
    # Without GPUs the cores pretend to be eight devices, whose FFTs can hang where they share too few threads.
    os.environ.setdefault("PJRT_NPROC", "16")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 8)
    main()
