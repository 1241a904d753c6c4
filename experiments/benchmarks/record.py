"""What a benchmark writes down: one row for each case and implementation, and where and with what it was measured."""

import dataclasses
import datetime
import json
import math
import os
import platform
from pathlib import Path
from typing import Any, Literal, Self

import jax

from experiments.benchmarks.cases import Direction, Dtype, Protocol
from experiments.benchmarks.implementations import OURS
from pallas_kernels.records import driver_version, first_line, package_versions, write_atomically

type Status = Literal["measured", "wrong", "unsupported", "failed", "not installed", "not measured"]
"""``wrong`` was timed, but its result is not the convolution; such a row is never compared with."""

WRONG = 0.1
"""Relative error from which a result is not the convolution, whatever the arithmetic: bfloat16 gives some 5e-3."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation on one case. Times are scaled to ``scaled_rows`` rows where fewer were run."""

    implementation: str
    protocol: Protocol
    length: int
    dtype: Dtype
    direction: Direction
    gated: bool
    status: Status
    reason: str | None = None
    batch: int | None = None
    features: int | None = None
    scaled_rows: int | None = None
    """Rows that the times are scaled to; None where they are those of batch x features."""
    ms: float | None = None
    ms_quartiles: tuple[float, float] | None = None
    bytes_per_second: float | None = None
    flop_per_second: float | None = None
    factors: tuple[int, ...] | None = None
    """The plan whose FLOP are counted; None counts 5/2 N log2 N for each real FFT."""
    memory_floor_ms: float | None = None
    tensor_floor_ms: float | None = None
    temporary_per_u: float | None = None
    """Bytes on the device beyond inputs and outputs, over the bytes of u."""
    errors: dict[str, float] | None = None
    """Relative L2 error against float64 of y, and of the gradient in each argument."""
    source: str | None = None
    """Who measured a row that this program did not."""

    @property
    def case(self) -> tuple[Protocol, Dtype, Direction, bool, int]:
        return self.protocol, self.dtype, self.direction, self.gated, self.length

    @property
    def error(self) -> float | None:
        """The largest of the errors."""
        return max(self.errors.values()) if self.errors else None


@dataclasses.dataclass
class Record:
    """The rows of one run."""

    device: str
    platform: str
    date: str
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: list[Row] = dataclasses.field(default_factory=list)

    def write(self, path: Path) -> None:
        """Replaces the file in one step, so that it is whole whenever the program is killed."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a file.

        Raises:
          ValueError: if the file cannot be read, or is not a record. It names the file.
        """
        wrote = "a file that python -m experiments.benchmarks.convolution wrote"
        try:
            fields = json.loads(path.read_text())
            record = cls(**(fields | {"rows": [_row(row) for row in fields["rows"]]}))
            record.versions["jax"]
        except OSError as error:
            raise ValueError(f"{path} must be {wrote}, and cannot be read ({error.strerror or error}).") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # of JSON, and of what else it can hold
            raise ValueError(
                f"{path} must be {wrote}; it is not a record of benchmarks ({type(error).__name__}: {error})."
            ) from error
        return record


def speedups(row: Row, rows: list[Row]) -> tuple[float | None, float | None, str | None]:
    """How many times faster a row is than `jnp.fft` and than its fastest rival, and that rival's name."""
    rivals = {
        other.implementation: other.ms
        for other in rows
        if other.case == row.case and other.implementation not in OURS and other.status == "measured" and other.ms
    }
    if row.ms is None or row.status != "measured" or not rivals:
        return None, None, None
    fastest = min(rivals, key=lambda name: rivals[name])
    by_hand = rivals.get("jnp_fft")
    return by_hand and by_hand / row.ms, rivals[fastest] / row.ms, fastest


def _row(fields: dict[str, Any]) -> Row:
    row: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Row(**row)


def finite(errors: dict[str, float]) -> bool:
    return all(math.isfinite(error) for error in errors.values())


def here(settings: dict[str, Any]) -> Record:
    """An empty record of this machine, now."""
    device = jax.devices()[0]
    versions = package_versions(("jax", "jaxlib", "numpy", "torch"))
    versions["python"] = platform.python_version()
    if device.platform == "gpu":
        versions["runtime"] = device.client.platform_version.replace("\n", " ")
        versions["driver"] = driver_version()
    if commit := first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"):
        versions["commit"] = commit
    name = device.device_kind if device.platform == "gpu" else f"CPU ({platform.machine()}, {_cores()} cores)"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Record(device=name, platform=device.platform, date=date, versions=versions, settings=settings)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
