"""The table of what each kernel that ships uses: what the compiler said of it once, and the hash of what it compiled.

    python -m tests.kernels.resources

renews `resources.json`: it compiles what changed, two programs at a time, some three seconds each, and prints the
table. It needs the cuda-aot extra and no GPU.
"""

import concurrent.futures
import json
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the plugin that compiles would look for a driver

from tests.kernels import ahead_of_time, sources
from tests.kernels.programs import PROGRAMS, Program

FILE = Path(__file__).with_suffix(".json")
FIGURES = ("registers", "shared", "stack", "spilled")
RENEW = "renew it with `python -m tests.kernels.resources`, which needs the cuda-aot extra"


def table() -> dict[str, dict[str, Any]]:
    """Program -> its digest, notes of the compiler, and figure -> number, as committed."""
    return json.loads(FILE.read_text())["kernels"]


def versions() -> dict[str, str]:
    """Those of jax and of the wheels that the table was made with."""
    return json.loads(FILE.read_text())["versions"]


def outdated(known: dict[str, dict[str, Any]], versions: dict[str, str]) -> list[Program]:
    """Programs that the table lacks, or that were compiled from something else."""
    return [
        program
        for program in PROGRAMS
        if known.get(str(program), {}).get("digest") != sources.digest(program, versions)
    ]


def _row(program: Program) -> dict[str, Any]:
    verdict = ahead_of_time.verdict(program)
    figures = {figure: getattr(verdict, figure) for figure in FIGURES}
    return {"digest": sources.digest(program, ahead_of_time.versions() or {}), **figures, "notes": list(verdict.notes)}


def main() -> None:
    """Compiles what changed, prints the table and writes it."""
    installed = ahead_of_time.versions()
    if installed is None:
        raise SystemExit(f"compiling needs the cuda-aot extra: {', '.join(ahead_of_time.WHEELS)}")
    known = table() if FILE.exists() else {}
    changed = outdated(known, installed)
    print(f"{len(changed)} of {len(PROGRAMS)} programs to compile")
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would not copy
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        new = {str(program): pool.submit(_row, program) for program in changed}
        print(f"{'':62}" + "".join(f"{figure:>12}" for figure in FIGURES))
        rows = {}
        for name in map(str, PROGRAMS):
            row = rows[name] = new[name].result() if name in new else known[name]
            print(f"{name:62}" + "".join(f"{row[figure]:12,}" for figure in FIGURES), *row["notes"], flush=True)
    text = json.dumps({"versions": installed, "kernels": rows}, indent=1)
    row_on_a_line = re.compile(r'(?<=": )\{\s+"digest".*?\n  \}', re.DOTALL)
    FILE.write_text(row_on_a_line.sub(lambda row: re.sub(r"\s*\n\s*", " ", row[0]), text) + "\n")


if __name__ == "__main__":
    main()
