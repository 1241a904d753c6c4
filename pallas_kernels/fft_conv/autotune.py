"""Measures every configuration that fits on this machine's GPU and writes the table of the fastest.

    python -m pallas_kernels.fft_conv.autotune --out nvidia_h200.json

What is timed is `fft_conv`, or its gradient, with the taps' transform, on a queue of calls; configurations of one
kernel take turns, so that a clock that slows down slows all of them. A configuration whose result is wrong cannot win.
The file is replaced whole after each kernel, size and dtype: a run that was ended goes on where it stopped, as long as
the device and the versions are the same. To use the table, put it in place of that in `pallas_kernels/fft_conv/tuned`,
or name it in the environment variable FFT_CONV_TUNED.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from pallas_kernels.fft_conv.api import fft_conv
from pallas_kernels.fft_conv.config import N1, Config, Kernel
from pallas_kernels.fft_conv.heuristic import candidates
from pallas_kernels.fft_conv.tuned import DTYPES, Candidate, Entry, Key, Run, Table, dump, forced, parse
from pallas_kernels.records import driver_version, package_versions, ptxas_version, write_atomically
from pallas_kernels.timing import Round, host_round

ROUNDS = 5
"""Times that a configuration has its turn; the median counts."""
AS_FAST = 1.01
"""What takes up to so many times the fastest's time is as fast: medians of one program differ by half a percent."""
TOLERANCES = {"bfloat16": 7e-3, "float16": 2.5e-3}
"""The relative L2 errors that `fft_conv` promises."""
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt")
_NAMES = {kernel.name.lower().replace("_", "-"): kernel for kernel in Kernel}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A kernel, and the convolution that is timed with each of its configurations."""

    kernel: Kernel
    n2: int
    dtype: str
    batch: int
    features: int

    def __str__(self) -> str:
        return f"{self.kernel.value}, L = {self.length}, {self.dtype}"

    @property
    def key(self) -> Key:
        return self.kernel, self.n2, self.dtype

    @property
    def length(self) -> int:
        return N1 * self.n2

    @property
    def channels(self) -> int:
        return 2 if "CHANNELS" in self.kernel.name else 1

    @property
    def gated(self) -> bool:
        return "GATED" in self.kernel.name

    @property
    def backward(self) -> bool:
        return "BACKWARD" in self.kernel.name

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch, "channels": self.channels, "features": self.features, "length": self.length}

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Of u, taps, the gates if there are any, and going back of the result's cotangent."""
        u = jax.ShapeDtypeStruct((self.batch, self.features, self.length), self.dtype)
        y = u.update(shape=(self.batch, self.channels, self.features, self.length))
        taps = jax.ShapeDtypeStruct((self.channels, self.features, self.length), jnp.float32)
        return [u, taps, *[u, y] * self.gated, *[y] * self.backward]

    def arrays(self) -> list[jax.Array]:
        """Standard normal numbers; taps divided by sqrt(L), so that y is of the size of u."""
        keys = jax.random.split(jax.random.key(0), 5)
        arrays = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, self.shapes(), strict=False)]
        arrays[1] *= self.length**-0.5
        return jax.block_until_ready(arrays)

    def results(self, convolve: Callable[..., jax.Array], *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """The convolution, or the gradient in every argument."""
        if not self.backward:
            return (convolve(*arrays),)
        *arguments, cotangent = arrays
        y, pull_back = jax.vjp(convolve, *arguments)
        return pull_back(cotangent.astype(y.dtype))


def problems(options: argparse.Namespace) -> list[Problem]:
    """What the options ask to measure."""
    return [
        Problem(_NAMES[name], n2, dtype, options.batch, options.features)
        for name in options.kernels
        for n2 in options.n2
        for dtype in options.dtypes
    ]


def fused(u, taps, pre_gate=None, post_gate=None):
    """The kernel under test."""
    return fft_conv(u, taps, pre_gate=pre_gate, post_gate=post_gate)


def by_fft(u, taps, pre_gate=None, post_gate=None):
    """The reference, in float32: its errors are a thousandth of the tolerances."""
    u, taps, *gates = (None if x is None else x.astype(jnp.float32) for x in (u, taps, pre_gate, post_gate))
    x = u if gates[0] is None else u * gates[0]
    n = 2 * u.shape[-1]
    spectrum = jnp.fft.rfft(x, n)[:, None] * jnp.fft.rfft(taps, n)
    y = jnp.fft.irfft(spectrum, n)[..., : u.shape[-1]]
    return y if gates[1] is None else y * gates[1]


def lower(problem: Problem, config: Config) -> export.Exported:
    """The program with this configuration, lowered for CUDA: seconds of Python, which processes share."""
    program = functools.partial(problem.results, fused)
    with forced({(problem.kernel, problem.n2): config}):
        exported = export.export(jax.jit(program), platforms=("cuda",))(*problem.shapes())
    return dataclasses.replace(exported, _get_vjp=None)  # a closure, and the one part of it that cannot be pickled


def _without_devices() -> None:
    """Keeps a process that only lowers away from the GPU."""
    jax.config.update("jax_platforms", "cpu")


def _compile(lowered: export.Exported, shapes: Sequence[jax.ShapeDtypeStruct]) -> Any:
    return jax.jit(lowered.call).lower(*shapes).compile()


@jax.jit
def _errors(results, expected):
    def error(got, want):
        return jnp.linalg.norm((got.astype(jnp.float32) - want).ravel()) / jnp.linalg.norm(want.ravel())

    return jnp.stack([error(got, want) for got, want in zip(results, expected, strict=True)]).max()


def compile_all(wanted: Sequence[Problem], blocks: int, workers: int) -> dict[Problem, dict[Config, Any]]:
    """Every configuration's program, or the exception that it ended in; none is timed while others are compiled."""
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")  # a copy of a process that holds a GPU would be of no use
    with (
        concurrent.futures.ProcessPoolExecutor(workers, context, _without_devices) as processes,
        concurrent.futures.ThreadPoolExecutor(workers) as threads,
    ):

        def compiled(problem: Problem, lowered: concurrent.futures.Future[export.Exported]) -> Any:
            try:
                return _compile(lowered.result(), problem.shapes())
            except Exception as error:  # whatever Mosaic or the assembler says of one must not end the others
                return error

        programs = {
            problem: {
                config: threads.submit(compiled, problem, processes.submit(lower, problem, config))
                for config in candidates(problem.kernel, problem.n2, blocks)
            }
            for problem in wanted
        }
        every = [program for of_problem in programs.values() for program in of_problem.values()]
        for number, _ in enumerate(concurrent.futures.as_completed(every), 1):
            if number % 10 == 0 or number == len(every):
                print(f"compiled {number} of {len(every)}, {time.monotonic() - started:.0f} s", flush=True)
        return {
            problem: {config: program.result() for config, program in of_problem.items()}
            for problem, of_problem in programs.items()
        }


def measure(problem: Problem, programs: dict[Config, Any], seconds: float) -> Iterator[Candidate]:
    """Checks and times the configurations of a problem.

    Args:
      problem: what is timed.
      programs: configuration -> compiled program, or the exception that it ended in.
      seconds: that each configuration is timed for, about.
    """
    arrays = problem.arrays()
    expected = jax.jit(functools.partial(problem.results, by_fft))(*arrays)
    rounds: dict[Config, Round] = {}
    errors: dict[Config, float] = {}
    for config, program in programs.items():
        try:
            if isinstance(program, Exception):
                raise program
            error = errors[config] = float(_errors(program(*arrays), expected))
        except Exception as reason:
            yield Candidate(config, failed=_sentence(reason))
            continue
        if error < TOLERANCES[problem.dtype]:
            rounds[config] = host_round(functools.partial(_call, program), [arrays], jax.block_until_ready)
        else:  # NaN too
            yield Candidate(config, error=error if math.isfinite(error) else None, failed="its result is wrong")
    calls = {config: max(1, min(1000, math.ceil(seconds / ROUNDS / (run(3) / 3)))) for config, run in rounds.items()}
    times: dict[Config, list[float]] = {config: [] for config in rounds}
    for _ in range(ROUNDS):
        for config, run in rounds.items():
            times[config].append(run(calls[config]) / calls[config])
    for config, taken in times.items():
        yield Candidate(config, round(1e3 * statistics.median(taken), 5), float(f"{errors[config]:.2e}"))


def _call(program: Any, arrays: Sequence[jax.Array]) -> Any:
    return program(*arrays)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def entry(problem: Problem, tried: Sequence[Candidate], run: int) -> Entry | None:
    """The fastest of the candidates, or None if all of them failed.

    Of those that are as fast, the one with the fewest warpgroups: its threads have the most registers, and its code the
    fewest spills.
    """
    timed = [one for one in tried if one.ms is not None]
    if not timed:
        return None
    limit = AS_FAST * min(one.ms or math.inf for one in timed)
    as_fast = [one for one in timed if (one.ms or math.inf) <= limit]
    fastest = min(as_fast, key=lambda one: (one.config.warpgroups, one.ms))
    name = "gradient" if problem.backward else "forward"
    by_time = tuple(sorted(tried, key=lambda one: one.ms or math.inf))
    return Entry(*problem.key, fastest.config, fastest.ms, name, problem.sizes, by_time, run)


def tune(options: argparse.Namespace, table: Table, here: Run, blocks: int) -> Table:
    """Measures what the table lacks, and writes it after each problem."""
    runs = (*table.runs, *[here] * (_same(table.runs, here) is None))
    run = _same(runs, here)
    assert run is not None
    done = {(key, *one.problem.items()) for key, one in table.entries.items() if one.run == run}
    wanted = [problem for problem in problems(options) if (problem.key, *problem.sizes.items()) not in done]
    print(f"{here.device}: {len(wanted)} to measure, {len(problems(options)) - len(wanted)} already in {options.out}")
    table = Table(runs, dict(table.entries))
    programs = compile_all(wanted, blocks, options.workers)
    for number, problem in enumerate(wanted, 1):
        print(f"[{number}/{len(wanted)}] {problem}", flush=True)
        tried = list(measure(problem, programs.pop(problem), options.seconds))
        for one in sorted(tried, key=lambda one: one.ms or math.inf):
            print(f"    {_line(one)}", flush=True)
        if found := entry(problem, tried, run):
            table = Table(runs, dict(table.entries) | {found.key: found})
            write_atomically(options.out, dump(_without_unused_runs(table)))
    return table


def _line(one: Candidate) -> str:
    slots = f"{one.config.spectrum_slots} slot{'s' * (one.config.spectrum_slots > 1)}"
    outcome = f"{one.ms:.4f} ms, error {one.error:.1e}" if one.failed is None else one.failed
    return f"{one.config.warpgroups} warpgroups, {slots}: {outcome}"


def _same(runs: Sequence[Run], here: Run) -> int | None:
    """The run on the same device with the same versions, whose measurements can be continued."""
    same = (index for index, run in enumerate(runs) if (run.device, run.versions) == (here.device, here.versions))
    return next(same, None)


def _without_unused_runs(table: Table) -> Table:
    used = sorted({one.run for one in table.entries.values()})
    entries = {key: dataclasses.replace(one, run=used.index(one.run)) for key, one in table.entries.items()}
    return Table(tuple(table.runs[index] for index in used), entries)


def report(table: Table) -> str:
    """The table in columns."""
    lines = [f"{'kernel':30}{'L':>6} {'dtype':9}{'warpgroups':>11}{'slots':>6}{'ms':>9}{'slowest':>9}{'error':>9}"]
    for (kernel, n2, dtype), one in table.entries.items():
        times = [candidate.ms for candidate in one.candidates if candidate.ms is not None]
        error = next((candidate.error for candidate in one.candidates if candidate.config == one.config), None)
        figures = [
            f"{'' if one.ms is None else f'{one.ms:.4f}':>9}",
            f"{f'{max(times):.4f}' if times else '':>9}",
            f"{'' if error is None else f'{error:.1e}':>9}",
        ]
        config = f"{one.config.warpgroups:>11}{one.config.spectrum_slots:>6}"
        lines.append(f"{kernel.value:30}{N1 * n2:>6} {dtype:9}{config}{''.join(figures)}")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = "Times every configuration of the kernels on this GPU and writes the table of the fastest."
    parser = argparse.ArgumentParser("python -m pallas_kernels.fft_conv.autotune", description=description)
    parser.add_argument("--out", type=Path, help="the table; one that is there is continued (default: <device>.json)")
    parser.add_argument("--kernels", nargs="+", choices=_NAMES, default=list(_NAMES), help="(default: all)")
    parser.add_argument("--n2", nargs="+", type=int, choices=(16, 32, 64), default=[16, 32, 64], help="L / 64")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--seconds", type=float, default=0.25, help="to time each configuration for (default: 0.25)")
    workers = max(1, (os.cpu_count() or 2) - 2)
    parser.add_argument("--workers", type=int, default=workers, help="processes that lower (default: cores but two)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be timed; needs no GPU")
    options = parser.parse_args(arguments)
    for name in ("batch", "features", "seconds", "workers"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be positive; got {getattr(options, name)}")
    return options


def _gpu() -> jax.Device | None:
    """The first CUDA device, if there is one."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _options(arguments)
    if options.dry_run:
        listed = [(problem, config) for problem in problems(options) for config in candidates(*problem.key[:2])]
        for problem, config in listed:
            print(f"{problem}: {config.warpgroups} warpgroups, {config.spectrum_slots} slots")
        print(f"{len(listed)} configurations of {len(problems(options))} kernels, sizes and dtypes")
        return 0
    device = _gpu()
    if device is None:
        print("autotune: JAX finds no CUDA device here; --dry-run lists what would be timed.", file=sys.stderr)
        return 2
    if device.compute_capability != "9.0":
        print(f"autotune: the kernels are for Hopper (sm_90); this is {device.device_kind}.", file=sys.stderr)
        return 2
    options.out = options.out or Path(device.device_kind.lower().replace(" ", "_") + ".json")
    if not options.out.parent.is_dir():
        print(f"autotune: {options.out.parent} is not a folder.", file=sys.stderr)
        return 2
    try:
        known = parse(options.out.read_text(), str(options.out)) if options.out.exists() else Table((), {})
    except ValueError as error:
        print(f"autotune: {error}", file=sys.stderr)
        return 2
    versions = package_versions(_PACKAGES) | {"driver": driver_version(), "ptxas": ptxas_version()}
    here = Run(device.device_kind, datetime.datetime.now(datetime.UTC).date().isoformat(), versions)
    table = tune(options, known, here, device.core_count)
    print(report(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
