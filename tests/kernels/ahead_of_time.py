"""What ptxas says of a program, compiled for Hopper on a machine without a GPU; each verdict is kept on disk."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks.hopper import WHEELS, devices, search_path
from tests.kernels import programs, sources

_CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache" / "kernels"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a kernel uses; bytes but for the registers, which are of a thread."""

    registers: int
    shared: int
    stack: int
    spilled: int
    notes: tuple[str, ...] = ()


@functools.cache
def versions() -> dict[str, str] | None:
    """Those of jax and of the wheels that compile, or None where one is missing."""
    try:
        return {name: importlib.metadata.version(name) for name in ("jax", *WHEELS)}
    except importlib.metadata.PackageNotFoundError:
        return None  # without libdevice, for one, the compiler would end the process


def verdict(program: programs.Program) -> Verdict:
    """From what the compiler printed now, or the last time with the same sources, configuration and versions."""
    installed = versions()
    assert installed is not None, f"needs the cuda-aot extra, {', '.join(WHEELS)}"
    digest = sources.digest(program, installed)
    file = _CACHE / f"{digest}.txt"
    if not file.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_CACHE, delete=False) as new:  # another process may write it too
            new.write(_log(program))
        Path(new.name).rename(file)
    return _parse(file.read_text())


def _log(program: programs.Program) -> str:
    kernel, operands = program.build()
    sharding = SingleDeviceSharding(devices()[0])
    operands = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in operands]
    settings = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1", "PATH": search_path()}
    with mock.patch.dict(os.environ, settings), _standard_output() as log:
        jax.jit(kernel).lower(*operands).compile()
    return log.getvalue()


@contextlib.contextmanager
def _standard_output() -> Iterator[io.StringIO]:
    """What Python and the compiler print: the latter writes to the file descriptor."""
    log = io.StringIO()
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(log):
        os.dup2(file.fileno(), 1)
        try:
            yield log
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            log.write(file.read().decode())


def _parse(log: str) -> Verdict:
    def numbers(pattern: str) -> list[int]:
        (found,) = re.finditer(pattern, log)  # of one kernel: the same one once more in a process would say nothing
        return [int(number) for number in found.groups()]

    (registers,) = numbers(r"Used (\d+) registers")
    (shared,) = numbers(r"smem_scratch_bytes=(\d+)")
    stack, *spilled = numbers(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
    notes = tuple(line.strip() for line in log.splitlines() if "Performance Loss" in line)
    return Verdict(registers, shared, stack, sum(spilled), notes)
