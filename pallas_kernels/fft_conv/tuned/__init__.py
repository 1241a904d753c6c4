"""Which configuration a kernel runs with: what was fastest when it was measured, or else what `heuristic` says.

`nvidia_h200.json`, written by ``python -m pallas_kernels.fft_conv.autotune``, is for every sm_90 device. The devices of
this machine are never looked at: a convolution is traced on machines without a GPU as well, and must lower there to
what it lowers to on the GPU. Who has measured a device of their own names the file in the environment variable
``FFT_CONV_TUNED``, which is read when a convolution is traced: set it before the program starts.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv.config import Config, Kernel
from pallas_kernels.fft_conv.heuristic import fits, heuristic

type Dtype = Literal["bfloat16", "float16"]
type Key = tuple[Kernel, int, str]
"""Kernel, n2 and dtype."""

DTYPES: tuple[str, ...] = get_args(Dtype.__value__)
VARIABLE = "FFT_CONV_TUNED"
_SHIPPED = "nvidia_h200.json"
_COMMAND = "python -m pallas_kernels.fft_conv.autotune"


@dataclasses.dataclass(frozen=True)
class Run:
    """Where, when and with what times were taken."""

    device: str
    date: str
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A configuration that was tried.

    Attributes:
      config: the configuration.
      ms: None where it failed.
      error: the largest relative L2 error of a result.
      failed: why it cannot be chosen.
    """

    config: Config
    ms: float | None = None
    error: float | None = None
    failed: str | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """The configuration of a kernel at a size and dtype.

    Attributes:
      kernel, n2, dtype: what it is for.
      config: the fastest of the candidates.
      ms: of `fft_conv`, or of its gradient, with the taps' transform; None where it was not recorded.
      timed: what the times are of.
      problem: sizes that were timed.
      candidates: what was tried, as far as it was recorded.
      run: which of the table's runs measured it.
    """

    kernel: Kernel
    n2: int
    dtype: str
    config: Config
    ms: float | None
    timed: str
    problem: dict[str, int]
    candidates: tuple[Candidate, ...]
    run: int

    @property
    def key(self) -> Key:
        return self.kernel, self.n2, self.dtype


@dataclasses.dataclass(frozen=True)
class Table:
    """Entries by what they are for, and the runs that measured them."""

    runs: tuple[Run, ...]
    entries: Mapping[Key, Entry]


def configuration(kernel: Kernel, n2: int, dtype: Any) -> Config:
    """The configuration of a kernel; a dtype that was not measured takes that of the other, which has 16 bits too.

    Raises:
      ValueError: if the file that ``FFT_CONV_TUNED`` names is not a table.

    Example:
      >>> configuration(Kernel.FORWARD, 64, "bfloat16").n2
      64
    """
    if forced_config := (_FORCED.get() or {}).get((kernel, n2)):
        return forced_config
    entries = _table(os.environ.get(VARIABLE, "")).entries
    name = jnp.dtype(dtype).name
    for known in sorted(DTYPES, key=lambda other: other != name):
        if entry := entries.get((kernel, n2, known)):
            return entry.config
    return heuristic(kernel, n2)


_FORCED: contextvars.ContextVar[Mapping[tuple[Kernel, int], Config] | None]
_FORCED = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def forced(configs: Mapping[tuple[Kernel, int], Config]) -> Iterator[None]:
    """Kernels that are traced inside take these configurations, to time or to test them.

    JAX's caches are emptied before and after: they hold traces of other configurations.

    Example:
      >>> with forced({(Kernel.FORWARD, 16): Config(16, warpgroups=1)}):
      ...     configuration(Kernel.FORWARD, 16, "float16").warpgroups
      1
    """
    jax.clear_caches()
    token = _FORCED.set(configs)
    try:
        yield
    finally:
        _FORCED.reset(token)
        jax.clear_caches()


@functools.cache
def _table(path: str) -> Table:
    if not path:
        return parse((resources.files(__name__) / _SHIPPED).read_text(), _SHIPPED)
    try:
        with open(path) as file:
            text = file.read()
    except OSError as error:
        raise ValueError(
            f"{VARIABLE} must name a table of configurations, which {_COMMAND} writes; cannot read {path}: "
            f"{error.strerror}."
        ) from error
    return parse(text, path)


def parse(text: str, name: str) -> Table:
    """The table in a file's text.

    Args:
      text: JSON as `dump` writes it.
      name: the file's, for messages.

    Raises:
      ValueError: if it is not a table, with the file, the entry and a way out.
    """

    def wrong(where: str, reason: object) -> ValueError:
        return ValueError(
            f"{name}{where}: {reason} Write the file anew with {_COMMAND}, or unset {VARIABLE} if it names this file."
        )

    try:
        fields = json.loads(text)
        runs = tuple(Run(**run) for run in fields["runs"])
        raw = list(fields["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise wrong("", f"not a table of configurations ({error!r}).") from error
    entries: dict[Key, Entry] = {}
    for index, item in enumerate(raw):
        where = f", entry {index}"
        try:
            where += f" ({item['kernel']}, n2 = {item['n2']}, {item['dtype']})"
            entry = _entry(item)
            _check(entry, len(runs))
        except KeyError as error:
            raise wrong(where, f"{error} is missing.") from error
        except (TypeError, ValueError) as error:
            raise wrong(where, error) from error
        if entry.key in entries:
            raise wrong(where, "a second entry for the same.")
        entries[entry.key] = entry
    return Table(runs, entries)


def _entry(item: dict[str, Any]) -> Entry:
    n2 = item["n2"]
    tried = [dict(candidate) for candidate in item["candidates"]]
    outcomes = [{name: one.pop(name, None) for name in ("ms", "error", "failed")} for one in tried]
    candidates = (Candidate(Config(n2, **one), **outcome) for one, outcome in zip(tried, outcomes, strict=True))
    changed = {
        "kernel": Kernel(item["kernel"]),
        "config": Config(n2, **item["config"]),
        "candidates": tuple(candidates),
    }
    return Entry(**item | changed)


def _check(entry: Entry, runs: int) -> None:
    """Raises ValueError for what the types of the fields let pass."""
    if entry.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {entry.dtype!r}.")
    if not fits(entry.kernel, entry.config):
        raise ValueError(f"{entry.config} needs more shared memory than a block has.")
    for ms in (entry.ms, *(candidate.ms for candidate in entry.candidates)):
        if ms is not None and not 0 < ms < float("inf"):
            raise ValueError(f"ms must be a positive number; got {ms}.")
    if not 0 <= entry.run < runs:
        raise ValueError(f"run must be the index of one of {runs} runs; got {entry.run}.")


def dump(table: Table) -> str:
    """The table as JSON that is easy to read and to compare: a line for each run and for each candidate."""

    def config(config: Config) -> dict[str, int]:
        return {name: value for name, value in dataclasses.asdict(config).items() if name != "n2"}

    def candidate(one: Candidate) -> dict[str, Any]:
        outcome = {"ms": one.ms, "error": one.error, "failed": one.failed}
        return config(one.config) | {name: value for name, value in outcome.items() if value is not None}

    order = {key: place for place, key in enumerate((k, n2, d) for k in Kernel for n2 in (16, 32, 64) for d in DTYPES)}
    entries = [
        dataclasses.asdict(entry)
        | {
            "kernel": entry.kernel.value,
            "config": config(entry.config),
            "candidates": [candidate(one) for one in entry.candidates],
        }
        for entry in sorted(table.entries.values(), key=lambda entry: order[entry.key])
    ]
    text = json.dumps({"runs": [dataclasses.asdict(run) for run in table.runs], "entries": entries}, indent=1)
    innermost = re.compile(r"\{[^{}]*\}")
    return innermost.sub(lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n"
