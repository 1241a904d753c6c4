"""What files of measurements have in common: the versions they were taken with, and that no kill leaves half of one."""

import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step; what cannot be written, on a full disk for one, leaves nothing behind."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        partial = Path(file.name)
        try:
            file.write(text)
            file.close()
            partial.chmod(0o644)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver_version() -> str:
    """NVIDIA's driver, as `nvidia-smi` tells it; "unknown" without one."""
    return first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def ptxas_version() -> str:
    """The assembler that compiles kernels: the first on the path, else that of the nvidia-cuda-nvcc package."""
    try:
        wheel = str(importlib.metadata.distribution("nvidia-cuda-nvcc").locate_file("nvidia/cu13/bin/ptxas"))
    except importlib.metadata.PackageNotFoundError:
        wheel = "ptxas"
    for command in ("ptxas", wheel):
        if found := re.search(r"\bV([\d.]+)", _output(command, "--version") or ""):
            return found[1]
    return "unknown"


def first_line(*command: str) -> str | None:
    """What a program prints first; None where it is not installed or fails."""
    output = _output(*command)
    return None if output is None else output.split("\n")[0]


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
