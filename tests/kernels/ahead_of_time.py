"""What ptxas says of a program, compiled for Hopper on a machine without a GPU; each verdict is kept on disk.

Needs the `cuda-aot` extra: the CUDA plugin compiles, without a driver, for a device that a description stands in for.
"""

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
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tests.kernels import programs, sources

WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm")
_CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache" / "kernels"

# What the compiler asks of a device; the figures are those of an H200.
_H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  clock_rate_ghz: 1.98
  device_address_bits: 64
}
"""


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


@functools.cache
def devices(count: int = 1):
    """Hopper GPUs that exist for the compiler alone."""
    return topologies.get_topology_desc(platform="cuda", target_config=_H200, topology=f"1x1x{count}").devices


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
    bin_folder = importlib.metadata.distribution("nvidia-cuda-nvcc").locate_file("nvidia/cu13/bin")
    settings = {
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",  # the first ptxas on it compiles
    }
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
