"""The table of what each kernel that ships uses. Renew and print it with `python -m tests.kernels.resources`."""

import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the plugin that compiles would look for a driver

from tests.kernels import ahead_of_time
from tests.kernels.programs import PROGRAMS

FILE = Path(__file__).with_suffix(".json")
FIGURES = ("registers", "shared", "stack", "spilled")


def table() -> dict[str, dict[str, int]]:
    """Program -> figure -> number, as committed."""
    return json.loads(FILE.read_text())["kernels"]


def versions() -> dict[str, str]:
    """Those of jax and of the wheels that the table was made with."""
    return json.loads(FILE.read_text())["versions"]


def main() -> None:
    """Compiles every program that is not in the cache, minutes on two cores."""
    print(f"{'':58}" + "".join(f"{figure:>12}" for figure in FIGURES))
    kernels = {}
    for program in PROGRAMS:
        verdict = ahead_of_time.verdict(program)
        figures = kernels[str(program)] = {figure: getattr(verdict, figure) for figure in FIGURES}
        print(f"{program!s:58}" + "".join(f"{number:12,}" for number in figures.values()), *verdict.notes, flush=True)
    text = json.dumps({"versions": ahead_of_time.versions(), "kernels": kernels}, indent=1)
    FILE.write_text(text.replace("\n   ", " ").replace("\n  }", " }") + "\n")  # a line for each program


if __name__ == "__main__":
    main()
