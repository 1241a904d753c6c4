"""Times the long convolution by every implementation at hand, with its error against float64 and its physical limits.

    python -m experiments.benchmarks.convolution --lengths 1024 2048 4096 --gated

On a GPU the defaults are the protocol of the published tables: B = 64, D = 768, bfloat16 sequences and float32 taps,
whose transform is included; times are medians over rounds of queued calls, and batches that would be too large are cut
and their times scaled. A machine without one measures what it can at a reduced size and says what it did not. Written
after every row: `convolution_DEVICE_DATE.json`, and at the end a figure of the same name.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if importlib.util.find_spec("torch"):  # JAX takes three quarters of a GPU's memory unless told to leave some
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import floors, implementations, plot, rivals
from experiments.benchmarks.cases import (
    DIRECTIONS,
    DTYPES,
    PROTOCOLS,
    Case,
    Inputs,
    random_inputs,
    reference,
    relative_errors,
)
from experiments.benchmarks.record import WRONG, Record, Row, Status, finite, here, speedups
from experiments.benchmarks.text import first_line, positive, slug
from pallas_kernels.timing import Effort, seconds_per_call

IMPLEMENTATIONS = ("mosaic_gpu", "triton", "jnp_fft", "xla", "butterfly", *rivals.RIVALS)
GPU_LENGTHS, CPU_LENGTHS = (256, 1024, 2048, 4096, 8192, 16384, 32768), (256, 1024, 4096)
GPU_ROWS, CPU_ROWS = (64, 768), (2, 16)

CACHE_BYTES = 60e6
"""Inputs that fit in an H200's L2 take turns with others, so that each call finds them in memory."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    started = time.perf_counter()
    gpu = jax.default_backend() == "gpu"
    settings = parse(argv, gpu=gpu)
    effort = Effort(repeats=5, limit_seconds=1.0) if settings.quick else Effort()
    record = here({key: value for key, value in vars(settings).items() if key != "out"})
    settings.out.mkdir(parents=True, exist_ok=True)
    stem = "_".join(["convolution", slug(record.device), record.date[:19].replace(":", "")])
    path = settings.out / f"{stem}.json"
    for case in cases(settings):
        late = time.perf_counter() - started > settings.seconds
        run = None if late else Bench(case, effort, settings.rows, gpu=gpu)
        for name in settings.implementations:
            if run is None or time.perf_counter() - started > settings.seconds:
                row = absent(name, case, "not measured", f"the {settings.seconds:g} s for the whole run were over")
            else:
                row = run.row(name)
            record.rows.append(row)
            record.write(path)
            print(progress(row), file=sys.stderr, flush=True)
    plot.draw(record, path.with_suffix(".png"))
    show(record, gpu=gpu)
    print(f"wrote {path} and its .png")


def parse(argv: Sequence[str] | None, *, gpu: bool) -> argparse.Namespace:
    batch, features = GPU_ROWS if gpu else CPU_ROWS
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.convolution", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--lengths", type=positive, nargs="+", default=list(GPU_LENGTHS if gpu else CPU_LENGTHS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16"])
    parser.add_argument("--directions", choices=DIRECTIONS, nargs="+", default=list(DIRECTIONS))
    parser.add_argument("--gated", action="store_true", help="with a gate on either side too")
    parser.add_argument("--protocols", choices=PROTOCOLS, nargs="+", default=["causal"])
    parser.add_argument("--implementations", choices=IMPLEMENTATIONS, nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--batch", type=positive, default=batch)
    parser.add_argument("--features", type=positive, default=features)
    parser.add_argument(
        "--max-elements",
        type=positive,
        default=2**29,
        help="largest B D L: longer sequences run at a smaller batch, scaled",
    )
    parser.add_argument("--rows", type=positive, help="scale times to so many sequences; default: batch times features")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"), help="folder for the JSON and PNG")
    parser.add_argument("--seconds", type=float, default=float("1e9"), help="start no row after so long")
    parser.add_argument("--quick", action="store_true", help="few short rounds")
    settings = parser.parse_args(argv)
    settings.rows = settings.rows or settings.batch * settings.features
    return settings


def cases(settings: argparse.Namespace) -> list[Case]:
    """Every case asked for, each at a batch that the memory holds. The length varies fastest."""
    return [
        Case(
            protocol=protocol,
            length=length,
            dtype=dtype,
            direction=direction,
            gated=gated,
            batch=batch_that_fits(settings, length),
            features=settings.features,
        )
        for protocol in settings.protocols
        for dtype in settings.dtype
        for direction in settings.directions
        for gated in ((False, True) if settings.gated else (False,))
        for length in settings.lengths
    ]


def batch_that_fits(settings: argparse.Namespace, length: int) -> int:
    """The batch, halved until B D L is small enough."""
    batch = settings.batch
    while batch > 1 and batch * settings.features * length > settings.max_elements:
        batch //= 2
    return batch


class Bench:
    """The implementations of one case, on the same inputs and against the same reference."""

    def __init__(self, case: Case, effort: Effort, rows: int, *, gpu: bool):
        self.case, self.effort, self.gpu = case, effort, gpu
        self.scale = rows / (case.batch * case.features)

    @functools.cached_property
    def sets(self) -> list[Inputs]:
        """The inputs, enough of them that they do not stay in the cache from one call to the next."""
        first = random_inputs(self.case, seed=0)
        size = sum(x.nbytes for x in first.values())
        more = 0 if size > CACHE_BYTES else min(7, int(2 * CACHE_BYTES / size))
        return [first, *(random_inputs(self.case, seed) for seed in range(1, 1 + more))]

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        return reference(self.case, self.sets[0])

    def row(self, name: str) -> Row:
        """Measures an implementation, or says why it was not measured."""
        if not self.gpu and (name in ("mosaic_gpu", "triton") or name in rivals.CUDA_ONLY):
            return absent(name, self.case, "not measured", "needs a CUDA device")
        if name in rivals.RIVALS and (module := rivals.missing(name)):
            return absent(name, self.case, "not installed", f"no module {module!r}")
        try:
            return self.measure(name)
        except NotImplementedError as error:
            return absent(name, self.case, "unsupported", first_line(error))
        except Exception as error:  # a rival may fail in any way, and the others are still worth measuring
            return absent(name, self.case, "failed", f"{type(error).__name__}: {first_line(error)}")
        finally:
            rivals.release()

    def measure(self, name: str) -> Row:
        case = self.case
        if name in rivals.RIVALS:
            prepared = rivals.prepare(name, case, self.sets, cuda=self.gpu)
        else:
            prepared = implementations.prepare(name, case, self.sets)
        errors = relative_errors(prepared.results(), self.expected)
        if not finite(errors):
            return absent(name, case, "wrong", "the result is not finite")
        seconds = seconds_per_call(prepared.round, self.effort)
        low, median, high = (float(x) for x in np.percentile(1e3 * self.scale * seconds, [25, 50, 75]))
        factors, flop = work(name, case)
        whole = dataclasses.replace(case, batch=round(case.batch * self.scale))
        limits = floors.LIMITS.get(jax.devices()[0].device_kind) if self.gpu else None
        wrong = max(errors.values()) > WRONG
        return Row(
            implementation=name,
            protocol=case.protocol,
            length=case.length,
            dtype=case.dtype,
            direction=case.direction,
            gated=case.gated,
            status="wrong" if wrong else "measured",
            reason=f"relative error {max(errors.values()):.2g}" if wrong else None,
            batch=case.batch,
            features=case.features,
            scaled_rows=whole.batch * case.features if self.scale != 1 else None,
            ms=median,
            ms_quartiles=(low, high),
            bytes_per_second=floors.compulsory_bytes(case) / (median / self.scale * 1e-3),
            flop_per_second=flop / (median / self.scale * 1e-3),
            factors=factors,
            memory_floor_ms=floors.memory_floor_ms(whole, limits) if limits else None,
            tensor_floor_ms=floors.tensor_floor_ms(whole, limits) if limits else None,
            temporary_per_u=None if prepared.temporary_bytes is None else prepared.temporary_bytes / u_bytes(case),
            errors=errors,
        )


def work(name: str, case: Case) -> tuple[tuple[int, ...] | None, float]:
    """The plan of an implementation that multiplies by DFT blocks, and the FLOP of a call."""
    plan = None
    if name == "mosaic_gpu":
        plan = floors.fused_plan(case.length, ahead=case.protocol == "circular")
    elif name == "triton":
        plan = floors.triton_plan(case.length)
    if plan is None:
        return None, floors.fft_flop(case)
    factors, blocks = plan  # it wraps by taps on both sides of lag 0: one plan for either protocol
    return factors, blocks * floors.plan_flop(case, factors, circular=False)


def absent(name: str, case: Case, status: Status, reason: str) -> Row:
    return Row(name, case.protocol, case.length, case.dtype, case.direction, case.gated, status, reason)


def u_bytes(case: Case) -> int:
    return case.batch * case.features * case.length * case.itemsize


def title(row: Row) -> str:
    return f"{row.protocol}, {row.dtype}, {row.direction}{', gated' if row.gated else ''}"


def progress(row: Row) -> str:
    result = row.reason if row.ms is None else f"{row.ms:.4g} ms"
    return f"{title(row)}, L = {row.length}, {row.implementation}: {row.status}, {result}"


def show(record: Record, *, gpu: bool) -> None:
    """Prints a table of what was measured, and under it one line for each reason why something was not."""
    settings, width = record.settings, 148
    console = Console(width=width, highlight=False)
    where = record.device if gpu else f"{record.device}: says nothing about a GPU"
    table = Table(
        title=f"Long convolution on {where}, B = {settings['batch']}, D = {settings['features']}, "
        f"jax {record.versions['jax']}, {record.date[:10]}",
        caption="x: times faster than. Floors: share of the time that memory, or tensor cores with the cheapest plan, "
        "need at least. temp/u: device memory beyond inputs and outputs. *: smaller batch, scaled.",
        box=None,
        padding=(0, 1),
    )
    columns = "L|implementation|B|ms|x jnp_fft|x best rival|GB/s|TFLOP/s|memory floor|tensor floor|temp/u|error"
    for column in columns.split("|"):
        table.add_column(column, justify="left" if column == "implementation" else "right", no_wrap=True)
    timed = [row for row in record.rows if row.ms is not None]
    heading = None
    for row in timed:
        if heading != (heading := title(row)):
            table.add_row("", f"[bold]{heading}[/bold]")
        table.add_row(*cells(row, record.rows))
    console.print(table)
    for line in reasons(record.rows):
        console.print(line, soft_wrap=True)


def cells(row: Row, rows: list[Row]) -> list[str]:
    by_hand, best, rival = speedups(row, rows)
    ours = row.implementation in implementations.OURS

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def share(floor: float | None) -> str:
        return "" if floor is None or row.ms is None else f"{100 * floor / row.ms:.0f} %"

    return [
        str(row.length),
        row.implementation + (" (wrong)" if row.status == "wrong" else ""),
        f"{row.batch}{'' if row.scaled_rows is None else '*'}",
        number(row.ms, ".4g"),
        number(by_hand, ".2f"),
        f"{best:.2f} {rival}" if ours and best else "",
        number(row.bytes_per_second and row.bytes_per_second / 1e9, ".3g"),
        number(row.flop_per_second and row.flop_per_second / 1e12, ".3g"),
        share(row.memory_floor_ms),
        share(row.tensor_floor_ms),
        number(row.temporary_per_u, ".3g"),
        number(row.error, ".1e"),
    ]


def reasons(rows: list[Row]) -> list[str]:
    """What was not measured and why, implementation by implementation."""
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        if row.status != "measured":
            key = (row.implementation, row.status, row.reason or "")
            found.setdefault(key, {})[str(row.length)] = None
    return [
        f"{name}: {status} at L = {', '.join(lengths)} ({reason})" for (name, status, reason), lengths in found.items()
    ]


if __name__ == "__main__":
    main()
