"""The report folder of a run. Every file in it is whole at any time: a killed run or a full disk loses nothing."""

import json
import os
import platform
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from experiments.digits.config import Config

LIBRARIES = ("flashbutterfly-jax", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "matplotlib")


class Report:
    """A new folder that collects what a run leaves behind.

    Args:
      folder: new or empty. None makes a new one below `reports/digits`, named after the time.

    Raises:
      ValueError: if the folder holds anything, or cannot be made or written to. What it holds is not touched.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder or Path("reports/digits") / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}"
        self.rows: list[dict[str, float]] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            present = [path.name for path in self.folder.iterdir()]
            if not present:
                self.write("metrics.jsonl", b"")
        except OSError as error:
            raise ValueError(
                f"report_dir must be a folder that can be made and written to; got {self.folder} ({error.strerror})."
            ) from error
        if present:
            raise ValueError(
                "report_dir must be a new or an empty folder, because reports are never overwritten; "
                f"got {self.folder}, which holds {min(present)}."
            )

    def write(self, name: str, content: bytes) -> None:
        """Writes a file beside its place, then moves it there."""
        partial = self.folder / f".{name}.partial"
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.folder / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def log(self, **row: float) -> None:
        """Adds a line to metrics.jsonl."""
        self.rows.append(row)
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def describe(self, config: Config) -> None:
        """Writes config.json: every option, the versions and the machine, enough to run the same again."""
        content = {
            "config": asdict(config),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            "machine": {"platform": platform.platform(), "cpu_cores": os.cpu_count()},
        }
        self.write("config.json", (json.dumps(content, indent=2, default=str) + "\n").encode())
