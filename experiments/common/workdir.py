"""The folder of a run: what describes it, `run.json`, and its metrics, `metrics.jsonl`.

Both are whole at any time: a killed run or a full disk loses no line that was there. Process 0 alone writes.
"""

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from experiments.common.errors import RunError
from experiments.common.task import Recipe
from pallas_kernels.records import package_versions

LIBRARIES = ("flashbutterfly-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

type Row = dict[str, Any]


class Workdir:
    """A new or empty folder, or that of an earlier run with the same recipe, which goes on.

    Raises:
      RunError: if it is the folder of another recipe or of something else, or cannot be made or written to. What it
        holds is not touched.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self.checkpoints = folder.absolute() / "checkpoints"
        self._run_file = folder / "run.json"
        self._whereabouts = recipe.whereabouts
        self._recipe = json.loads(json.dumps({"name": type(recipe).__name__, **asdict(recipe)}, default=str))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # One listing, because another process of this run may be writing its first file.
            present = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".partial"))
            self._starts = self._earlier_starts() if "run.json" in present else []
            if jax.process_index() == 0:
                write_whole(folder / ".writable.partial", b"", keep=False)
        except OSError as error:
            raise RunError(
                f"workdir must be a folder that can be made and written to; got {folder} ({error.strerror or error})."
            ) from error
        if present and "run.json" not in present and not self._killed_at_once(present):
            raise RunError(
                "workdir must be new, empty, or the folder of an earlier run, because nothing is ever overwritten; "
                f"got {folder}, which holds {present[0]} and no run.json."
            )

    def _killed_at_once(self, present: list[str]) -> bool:
        """Whether the folder is one of a run that ended before it could write run.json, and saved nothing."""
        return set(present) <= {"checkpoints", "metrics.jsonl"} and not any(
            path.stat().st_size for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".partial"
        )

    def _earlier_starts(self) -> list[Row]:
        try:
            content = json.loads(self._run_file.read_text())
            before, starts = content["recipe"], [*content["starts"]]
            old, new = _flat(before), _flat(self._recipe)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{self._run_file} does not describe a run, so that {self.folder} cannot go on; choose another workdir."
            ) from error
        changed = [
            f"{name} (was {old.get(name, 'absent')}, now {new.get(name, 'absent')})"
            for name in (new | old)
            if name not in self._whereabouts and (name not in old or name not in new or old[name] != new[name])
        ]
        if changed:
            raise RunError(
                f"the run in {self.folder} was started with another recipe, which differs in {', '.join(changed)}; "
                "choose another workdir, or the recipe of its run.json."
            )
        return starts

    def describe(self, step: int, program: Row) -> None:
        """Writes run.json: every option, and when, from which step and on what each start of the run went on.

        Args:
          step: from which it goes on.
          program: what is known of the compiled program.
        """
        if jax.process_index() != 0:
            return
        start = {
            "step": step,
            "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "device": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
            "platform": platform.platform(),
            "cpu_cores": os.cpu_count(),
            "versions": {"python": platform.python_version(), **package_versions(LIBRARIES)},
            **program,
        }
        content = {"recipe": self._recipe, "starts": [*self._starts, start]}
        write_whole(self._run_file, (json.dumps(content, indent=2) + "\n").encode())


class Metrics:
    """The rows of metrics.jsonl, one for each line.

    All of a row but `timing` is a function of the recipe alone. A run goes on behind the rows of the step of its
    checkpoint, which were all written before it was; step 0 has none.

    Raises:
      RunError: if a line that is there is none of ours, or those of the step are gone; the last line may be torn, where
        the power went.
    """

    def __init__(self, file: Path, step: int) -> None:
        self.file = file
        content = file.read_bytes() if file.exists() else b""
        lines = content.splitlines(keepends=True)
        if lines and not _is_row(lines[-1]):
            lines.pop()
        for number, line in enumerate(lines, 1):
            if not _is_row(line):
                raise RunError(
                    f"line {number} of {file} is no row of metrics; mend or remove it, or take a new workdir."
                )
        rows = [json.loads(line) for line in lines]
        # What was measured after the checkpoint is measured again.
        self.rows: list[Row] = [row for row in rows if row["step"] <= step]
        if step and (not self.rows or self.rows[-1]["step"] != step):
            raise RunError(
                f"{file} must have the rows until step {step}, where the run goes on, and they are not there; put them "
                "back, or choose another workdir."
            )
        kept = b"".join(line for line, row in zip(lines, rows, strict=True) if row["step"] <= step)
        if jax.process_index() == 0 and (kept != content or not file.exists()):
            write_whole(file, kept)

    def add(self, row: Row) -> None:
        """Writes a line, which is on the disk when this returns, or not in the file at all."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        if jax.process_index() == 0:
            with self.file.open("ab", buffering=0) as file:
                length = file.seek(0, os.SEEK_END)
                try:
                    if file.write(line) != len(line):
                        raise OSError(28, os.strerror(28), str(self.file))
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(length)
                    raise
        self.rows.append(row)


def write_whole(path: Path, content: bytes, *, keep: bool = True) -> None:
    """Writes a file beside its place and moves it there; unless it is to be kept, removes it again."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int)


def _flat(tree: Row, prefix: str = "") -> Row:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: Row = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
