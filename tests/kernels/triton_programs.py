"""Every Triton program that ships, compiled for every card without a GPU, and what the compiler made of it.

    python -m tests.kernels.triton_programs

renews `triton_programs.json`: it compiles what changed, two programs at a time, some two seconds each, and prints the
table. It needs the triton extra and no GPU.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.fft_conv.triton_plans import CARDS, Card, Plan, SharedPlan
from tests.kernels.sources import tokens

FILE = Path(__file__).with_suffix(".json")
RENEW = "renew it with `python -m tests.kernels.triton_programs`"
DTYPES = ("bfloat16", "float16", "float32")
TENSOR_CORES = {"8.0": "HMMA", "8.6": "HMMA", "8.9": "HMMA", "9.0": "HGMMA", "10.0": "UTCHMMA", "12.0": "HMMA"}
_TRITON = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"

# Directions with every gate that they can have, and three without: all others are parts of these.
_CONVOLVE = {"X_CHANNELS": 1, "FACTOR_CHANNELS": 0, "GATE_CHANNELS": 0, "OTHER_CHANNELS": 0, "CONJUGATE": 0}
_GATES = {"FACTOR_CHANNELS": 1, "GATE_CHANNELS": 2}
_BACK = {"X_CHANNELS": 2, "FACTOR_CHANNELS": 2, "GATE_CHANNELS": 1, "OTHER_CHANNELS": 1, "CONJUGATE": 1}
DIRECTIONS: dict[str, tuple[str, dict[str, int]]] = {
    "forward": ("convolve", _CONVOLVE),
    "forward, gated": ("convolve", _CONVOLVE | _GATES),
    "backward, sequences": ("convolve", _BACK),
    "forward, gated, aligned": ("convolve", _CONVOLVE | _GATES),
    "backward, sequences, aligned": ("convolve", _BACK),
    "backward, taps": ("correlate", _GATES | {"PARTS": 4}),
    "backward, taps, shared": ("backward", {"FACTOR_CHANNELS": 0, "GATE_CHANNELS": 0, "SEQUENCES": 0}),
    "backward, taps, shared, gated": ("backward", _GATES | {"SEQUENCES": 0}),
    "backward": ("backward", {"FACTOR_CHANNELS": 0, "GATE_CHANNELS": 0, "SEQUENCES": 1}),
    "backward, gated": ("backward", _GATES | {"SEQUENCES": 1}),
}
_WHOLE = "forward", "backward, taps, shared", "backward"


def directions(plan: Plan) -> tuple[str, ...]:
    """Those in which a plan's kernels are launched."""
    if not isinstance(plan, SharedPlan):
        return "forward", "forward, gated", "backward, sequences", "backward, taps"
    if plan.together:
        return "forward", "forward, gated", "backward", "backward, gated"
    return (
        "forward",
        "forward, gated",
        "forward, gated, aligned",
        "backward, sequences",
        "backward, sequences, aligned",
        "backward, taps, shared",
        "backward, taps, shared, gated",
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel for a plan, a dtype and a direction, on a card."""

    direction: str
    plan: Plan
    dtype: str
    card: Card

    def __str__(self) -> str:
        capability = self.card.capability.replace(".", "")
        return f"{self.direction}, {self.plan.n1} x {self.plan.n2}, {self.dtype}, sm_{capability}"

    @property
    def kernel(self) -> str:
        return DIRECTIONS[self.direction][0]

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def constants(self) -> dict[str, int]:
        """Of a batch and a length that fill no tile, so that everything is masked; without gates nothing is."""
        whole = self.direction in _WHOLE
        sizes = {"BATCH": 64 if whole else 63, "CHANNELS": 1 if whole else 2, "FEATURES": 768}
        sizes["LENGTH"] = self.plan.points - (0 if whole else 8 if self.direction.endswith("aligned") else 3)
        spectra = sizes["CHANNELS"] * sizes["FEATURES"]
        sizes["ROWS"] = self.plan.rows_of_program(self.kernel, sizes["BATCH"], spectra)
        if self.kernel == "correlate":
            sizes["TILES"] = 16 // sizes["ROWS"]
        given = sizes | DIRECTIONS[self.direction][1]
        return given | self.plan.constants(self.kernel, given, self.itemsize)

    @property
    def function(self):
        """The kernel as Triton has it."""
        return getattr(importlib.import_module(self.plan.module), self.kernel)

    @property
    def warps(self) -> int:
        return self.plan.warps_of(self.kernel, self.constants, self.itemsize)

    @property
    def stages(self) -> int:
        return self.plan.stages_of(self.kernel)

    @property
    def types(self) -> dict[str, str]:
        """Of the kernel's pointers."""
        tables = "bf16" if self.dtype == "float32" else _TRITON[self.dtype]
        found = {}
        for name in self.function.arg_names:
            if name not in self.constants:
                table = name in ("spectrum", "f1", "f1_back", "f2", "twiddle")
                found[name] = tables if table else _TRITON[self.dtype]
        return found | ({} if self.kernel == "convolve" else {"out": "fp32"})


PROGRAMS = tuple(
    Program(direction, plan, dtype, card)
    for dtype, card in itertools.product(DTYPES, CARDS.values())
    for plan in card.plans
    for direction in directions(plan)
)


@functools.cache
def _source(module: str) -> str:
    return tokens(Path(importlib.import_module(module).__file__).read_text())


def digest(program: Program, version: str) -> str:
    """The hash of what a program is compiled from: the kernels' source, its constants and options, and the compiler."""
    given = {
        "source": _source(program.plan.module),
        "kernel": program.kernel,
        "constants": program.constants,
        "types": program.types,
        "warps": program.warps,
        "stages": program.stages,
        "capability": program.card.capability,
        "triton": version,
    }
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def verdict(program: Program) -> dict[str, Any]:
    """Registers of a thread, bytes of stack and of shared memory, and how many instructions of each kind of product."""
    kernel, constants, types = program.function, program.constants, program.types
    signature = {name: "constexpr" if name in constants else f"*{types[name]}" for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", int(program.card.capability.replace(".", "")), 32),
        options={"num_warps": program.warps, "num_stages": program.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        assembly = _run("nvdisasm", file.name)
    (registers, stack) = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    products = {name: len(re.findall(rf"\b{name}\b", assembly)) for name in ("HMMA", "HGMMA", "UTCHMMA")}
    products = {name: count for name, count in products.items() if count}
    return {
        "registers": registers,
        "shared": compiled.metadata.shared,
        "stack": stack,
        "spills": spills,
        "products": products,
    }


def _run(binary: str, *arguments: str) -> str:
    return subprocess.run([_BINARIES / binary, *arguments], capture_output=True, text=True, check=True).stdout


def table() -> dict[str, dict[str, Any]]:
    """Program -> its digest and its verdict, as committed."""
    return json.loads(FILE.read_text())["programs"]


def version() -> str:
    """That of Triton with which the table was made."""
    return json.loads(FILE.read_text())["triton"]


def outdated(known: dict[str, dict[str, Any]], version: str) -> list[Program]:
    """Programs that the table lacks, or that were compiled from something else."""
    return [one for one in PROGRAMS if known.get(str(one), {}).get("digest") != digest(one, version)]


def main() -> None:
    """Compiles what changed, prints the table and writes it as it grows."""
    installed = importlib.metadata.version("triton")
    known = table() if FILE.exists() else {}
    changed = outdated(known, installed)
    print(f"{len(changed)} of {len(PROGRAMS)} programs to compile", flush=True)
    rows = {str(one): known[str(one)] for one in PROGRAMS if one not in changed}
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        for program, found in zip(changed, pool.map(verdict, changed), strict=True):
            rows[str(program)] = {"digest": digest(program, installed), **found}
            print(f"{program!s:56}", *(f"{name} {value}" for name, value in found.items()), sep="  ", flush=True)
            _write(installed, rows)
    _write(installed, {str(one): rows[str(one)] for one in PROGRAMS})


def _write(installed: str, rows: dict[str, dict[str, Any]]) -> None:
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    partial = FILE.with_suffix(f".{os.getpid()}")
    partial.write_text(f'{{\n "triton": {json.dumps(installed)},\n "programs": {{\n{lines}\n }}\n}}\n')
    partial.replace(FILE)


if __name__ == "__main__":
    main()
