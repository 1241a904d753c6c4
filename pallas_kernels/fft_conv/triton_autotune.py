"""Times the Triton kernels by their plans and by others on this machine's GPU: what each plan was chosen over.

    python -m pallas_kernels.fft_conv.triton_autotune --lengths 8192 --dtypes bfloat16

What is timed is `fft_conv_triton`, or its gradient, causal and with the taps' transform, on a queue of calls. Each
alternative replaces fields of a plan in use, and its errors against float32 FFTs are measured too. On Hopper `--kernels
registers` times the kernels of compute capability 8.x and 12.0, as far as one GPU can stand in for another. The JSON is
replaced whole after each row. Nothing is put in use by itself.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv import triton_launch
from pallas_kernels.fft_conv.triton_api import fft_conv_triton
from pallas_kernels.fft_conv.triton_plans import (
    CARDS,
    MMA_PLANS,
    TCGEN05_PLANS,
    WGMMA_PLANS,
    Card,
    Plan,
    RegisterPlan,
    plan_for,
)
from pallas_kernels.records import driver_version, package_versions, write_atomically
from pallas_kernels.timing import Effort, host_round, seconds_per_call

ALTERNATIVES: dict[Plan, tuple[dict[str, Any], ...]] = {
    MMA_PLANS[0]: ({"stages": 1}, {"rows": 1}, {"warps": 8}),
    MMA_PLANS[1]: ({"chunk": 16}, {"chunk": 16, "warps": 8}),
    WGMMA_PLANS[2]: ({"anew": 8}, {"anew": 8, "least_chunk": 32}, {"packed": True}),
    WGMMA_PLANS[3]: ({"packed": False}, {"packed": False, "warps_back": 8}, {"block": 128, "warps_back": 8}),
    TCGEN05_PLANS[2]: ({"packed": False},),
    TCGEN05_PLANS[3]: ({"chunk": 32}, {"chunk": 16}, {"anew": 8}),
}
"""Plan in use -> what could be instead. Some of these spill."""

DIRECTIONS = ("forward", "forward+backward")
DTYPES = ("bfloat16", "float16", "float32")
_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton")


def card_at_hand(kernels: str) -> Card:
    """That of this process; with the plans for operands in registers, if those are asked for.

    Raises:
      NotImplementedError: if there is none that the kernels are for, or no Triton that works.
    """
    card = triton_launch.this_card()
    return dataclasses.replace(card, all_plans=MMA_PLANS) if kernels == "registers" else card


def variants(plan: Plan) -> dict[str, Plan]:
    """A plan in use and its alternatives, by what they replace.

    Example:
      >>> list(variants(MMA_PLANS[1]))
      ['in use', 'chunk = 16', 'chunk = 16, warps = 8']
    """
    found = {"in use": plan}
    for change in ALTERNATIVES.get(plan, ()):
        name = ", ".join(f"{field} = {value}" for field, value in change.items())
        found[name] = dataclasses.replace(plan, **change)
    return found


@contextlib.contextmanager
def only(card: Card, plan: Plan) -> Iterator[None]:
    """While it lasts, the card has this plan alone."""
    jax.clear_caches()  # JAX keeps what it has traced, and knows nothing of plans
    with mock.patch.dict(CARDS, {card.capability: dataclasses.replace(card, all_plans=(plan,))}):
        yield
    jax.clear_caches()


@dataclasses.dataclass(frozen=True)
class Problem:
    """The convolution that is timed."""

    length: int
    dtype: str
    direction: str
    gated: bool
    batch: int
    features: int

    def arrays(self) -> list[jax.Array]:
        """u, taps and the cotangent of y, then the gates; normal numbers, taps of the size that leaves y that of u."""
        shape = self.batch, self.features, self.length
        u, g, *gates = (
            jax.random.normal(key, shape, self.dtype) for key in jax.random.split(jax.random.key(0), 2 + 2 * self.gated)
        )
        taps = jax.random.normal(jax.random.key(1), (1, *shape[1:])) * self.length**-0.5
        return [u, taps, g[:, None], *gates]

    def results(self, convolve, u, taps, g, *gates) -> tuple[jax.Array, ...]:
        """y, and going back the gradient in every argument."""
        y, pull_back = jax.vjp(convolve, u, taps, *gates)
        return (y,) if self.direction == "forward" else (y, *pull_back(g.astype(y.dtype)))


def fused(u, taps, pre_gate=None, post_gate=None):
    """The kernels under test."""
    return fft_conv_triton(u, taps, pre_gate=pre_gate, post_gate=None if post_gate is None else post_gate[:, None])


def by_fft(u, taps, pre_gate=None, post_gate=None):
    """The reference, in float32: its errors are a thousandth of the kernels'."""
    u, taps, *gates = (None if x is None else x.astype(jnp.float32) for x in (u, taps, pre_gate, post_gate))
    x = u if gates[0] is None else u * gates[0]
    spectrum = jnp.fft.rfft(x, 2 * u.shape[-1])[:, None] * jnp.fft.rfft(taps, 2 * u.shape[-1])
    y = jnp.fft.irfft(spectrum, 2 * u.shape[-1])[..., : u.shape[-1]]
    return y if gates[1] is None else y * gates[1][:, None]


@jax.jit
def _error(results, expected):
    """The largest relative L2 error."""
    pairs = zip(results, expected, strict=True)
    return jnp.stack(
        [jnp.linalg.norm((x.astype("f4") - y).ravel()) / jnp.linalg.norm(y.ravel()) for x, y in pairs]
    ).max()


def measure(problem: Problem, arrays: Sequence[jax.Array], expected, effort: Effort) -> dict[str, Any]:
    """Milliseconds, and the error, of a call with the plans that are there; or the reason why there are none."""
    try:
        call = jax.jit(functools.partial(problem.results, fused)).lower(*arrays).compile()
        error = float(_error(call(*arrays), expected))
        run = host_round(lambda operands: call(*operands), [arrays], jax.block_until_ready)
        seconds = statistics.median(seconds_per_call(run, effort))
    except Exception as reason:  # whatever the compiler says of one plan must not end the others
        return {"failed": f"{type(reason).__name__}: {reason}".splitlines()[0][:200]}
    return {"ms": round(1e3 * seconds, 5), "error": float(f"{error:.2e}")}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _options(arguments)
    try:
        card = card_at_hand(options.kernels)
        plans = {length: plan_for(length, card) for length in options.lengths}
    except NotImplementedError as error:
        print(f"triton_autotune: {error}", file=sys.stderr)
        return 2
    if not options.out.parent.is_dir() or options.out.is_dir():
        print(f"triton_autotune: --out must be a file in a folder that exists; got {options.out}", file=sys.stderr)
        return 2
    versions = package_versions(_PACKAGES) | {"driver": driver_version()}
    record: dict[str, Any] = {"device": jax.devices()[0].device_kind, "versions": versions, "rows": []}
    record["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    for problem in problems(options):
        arrays = jax.block_until_ready(problem.arrays())
        expected = jax.jit(functools.partial(problem.results, by_fft))(*arrays)
        plan = plans[problem.length]
        for name, one in variants(plan).items():
            with only(card, one):
                found = measure(problem, arrays, expected, Effort(limit_seconds=options.seconds))
            kind = "registers" if isinstance(plan, RegisterPlan) else "shared"
            record["rows"].append(dataclasses.asdict(problem) | {"kernels": kind, "plan": name} | found)
            write_atomically(options.out, json.dumps(record, indent=1) + "\n")
            outcome = found.get("failed") or f"{found['ms']:.4f} ms, error {found['error']:.1e}"
            print(f"L = {problem.length}, {problem.dtype}, {problem.direction}, {name}: {outcome}", flush=True)
    return 0


def problems(options: argparse.Namespace) -> list[Problem]:
    """What the options ask to measure; the length varies fastest."""
    return [
        Problem(length, dtype, direction, options.gated, options.batch, options.features)
        for dtype in options.dtypes
        for direction in options.directions
        for length in options.lengths
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = "Times the Triton kernels by their plans and by others on this GPU."
    parser = argparse.ArgumentParser("python -m pallas_kernels.fft_conv.triton_autotune", description=description)
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192], help="(default: 1024 to 8192)"
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["bfloat16", "float32"],
        help="of sequences (default: bfloat16 float32)",
    )
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), help="(default: both)")
    parser.add_argument("--gated", action="store_true", help="with a gate on either side instead of none")
    parser.add_argument("--kernels", choices=("card", "registers"), default="card", help="(default: those of the card)")
    parser.add_argument("--batch", type=int, default=64, help="(default: 64)")
    parser.add_argument("--features", type=int, default=768, help="(default: 768)")
    parser.add_argument("--seconds", type=float, default=1.0, help="to time each row for, at most (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("triton_plans.json"), help="the JSON (default: triton_plans.json)"
    )
    options = parser.parse_args(arguments)
    for name in ("lengths", "batch", "features", "seconds"):
        values = getattr(options, name)
        if not min(values if isinstance(values, list) else [values]) > 0:  # nor not a number
            parser.error(f"--{name} must be positive; got {values}")
    return options


if __name__ == "__main__":
    sys.exit(main())
