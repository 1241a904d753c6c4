"""Times the kernels with learned blocks against the fixed ones, forward and backward, on a Hopper GPU.

    python -m experiments.butterfly.kernel_speed --out learned_kernel.json
    python -m experiments.butterfly.kernel_speed --points 16384 65536 --out learned_long.json     # in three passes
    python -m experiments.butterfly.kernel_speed --errors --points 1024 --out learned_errors.json     # no times

For each length, D = 768, bfloat16, B = 64 up to 16,384 steps and of as many steps in all beyond, the transform of the
taps inside the timing on both sides: milliseconds forward, and forward with the cotangents of everything that is
learned: of u and the taps on both sides, and of all six or nine blocks on the learned one; their ratios; and first,
before anything is timed, the learned kernels' relative L2 errors against float64, with blocks that are not Fourier's,
of a cotangent that is zero but in some rows.

From 8192 to 32,768 steps the fixed kernels have two ways, and learned ones are timed against both. `fixed` is the one
that `long_conv` takes, by blocks of 4096 steps, in a single launch but for the way back at 32,768: the one to beat.
Only Fourier's blocks and causal taps allow it. `same_passes` has the three passes that learned blocks have
(`fixed_passes`): that ratio is what it costs that blocks are learned, the other what it costs to have given up the
shorter way, too. At other lengths both are the same passes.

The file is written anew after every figure. Most of the time goes to compiling; needs jax and numpy alone.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashbutterfly_jax import LearnedButterfly, learned_long_conv, long_conv
from pallas_kernels.fixed_passes import fixed_in_three_passes
from pallas_kernels.records import driver_version, package_versions, write_atomically
from pallas_kernels.timing import Effort, host_round, seconds_per_call

BATCH, FEATURES = 64, 768
STEPS = 2**20
"""Of a feature in the whole batch, at most."""
SETS = 3
"""Of inputs that take turns, so that none is in the cache of 50 MB when its turn comes."""
SOME = slice(None, None, 8), slice(None, None, 96)
"""Rows of the batch and features whose results are compared with float64's, 64 of 64 rows of 768 features."""
OTHER_WAY = range(8192, 32768 + 1)
"""Lengths at which `long_conv` does not take the passes of learned blocks."""


def factors_of(points: int) -> tuple[int, ...]:
    """Those that a transform of so many points has kernels for.

    Example:
      >>> factors_of(1024), factors_of(65536)
      ((64, 16), (16, 64, 64))
    """
    return (64, points // 64) if points <= 4096 else (points // 4096, 64, 64)


def blocks_of(butterfly: LearnedButterfly) -> dict[str, Any]:
    """Blocks of an imagined trained layer: the DFT and a third of it in noise."""
    tree = butterfly.init(jax.random.key(0), FEATURES, math.prod(butterfly.factors or ()))
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + 0.3 * jnp.abs(leaf).max() * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def both_ways(forward: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The function (g, *arguments) -> (result, cotangents of the arguments for that of the result, g)."""

    def run(g: jax.Array, *arguments: Any) -> Any:
        y, cotangents = jax.vjp(forward, *arguments)
        return y, cotangents(g)

    return run


def errors(got: Any, g: jax.Array, arguments: Any, butterfly: LearnedButterfly) -> dict[str, Any]:
    """Relative L2 errors of (result, cotangents of u, taps, blocks) against float64, where g is zero but in `SOME`."""
    (u, taps, blocks), (_, features) = arguments, SOME
    y, (d_u, d_taps, d_blocks) = got
    some = y[SOME], (d_u[SOME], d_taps[features], d_blocks)
    with jax.enable_x64(True):
        wide = functools.partial(jax.tree.map, lambda x: jnp.asarray(np.asarray(x, np.float64)))
        function = both_ways(lambda u, taps, blocks: learned_long_conv(u, taps, blocks=blocks, butterfly=butterfly))
        want = jax.jit(function)(wide(g[SOME]), wide(u[SOME]), wide(taps[features]), wide(blocks))

    def error(got: jax.Array, want: jax.Array) -> float:
        exact = np.asarray(want, np.float64)
        return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))

    y_error, (u_error, taps_error, blocks_error) = jax.tree.map(error, some, want)
    return {"y": y_error, "d_u": u_error, "d_taps": taps_error, "d_blocks": blocks_error}


def inputs(length: int, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cotangent of the result, u and the taps."""
    g, u, taps = jax.random.split(jax.random.key(seed), 3)
    rows = (min(BATCH, STEPS // length), FEATURES, length)
    return (
        jax.random.normal(g, rows, jnp.bfloat16),
        jax.random.normal(u, rows, jnp.bfloat16),
        jax.random.normal(taps, (FEATURES, length)) / math.sqrt(length),
    )


def measure(length: int, effort: Effort | None) -> Iterator[dict[str, Any]]:
    """The row of one length, again after each figure that is added to it; None measures the errors alone."""
    butterfly = LearnedButterfly("right_angle", factors_of(length), per_stage=True, learn_inverse=True)
    blocks = blocks_of(butterfly)

    def fixed(u: jax.Array, taps: jax.Array) -> jax.Array:
        return long_conv(u, taps, implementation="mosaic_gpu")

    def learned(u: jax.Array, taps: jax.Array, blocks: Any) -> jax.Array:
        return learned_long_conv(u, taps, blocks=blocks, butterfly=butterfly, implementation="mosaic_gpu")

    def build(function: Callable[..., Any], arguments: Any) -> Callable[..., Any]:
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        print(f"L = {length}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
        return compiled

    g, *arguments = *inputs(length, 2), blocks
    row: dict[str, Any] = {"length": length, "batch": g.shape[0]}
    both = build(both_ways(learned), (g, *arguments))
    sparse = jnp.zeros_like(g).at[SOME].set(g[SOME])
    row["errors"] = errors(both(sparse, *arguments), sparse, arguments, butterfly)
    yield row
    if effort is None:
        return

    fixed_sets = [(g, *arguments[:2]), *(inputs(length, 2 + i) for i in range(1, SETS))]
    learned_sets = [(*one, blocks) for one in fixed_sets]

    def milliseconds(compiled: Callable[..., Any], sets: list[Any]) -> float:
        run = host_round(lambda arguments: compiled(*arguments), sets, jax.block_until_ready)
        return 1e3 * float(np.median(seconds_per_call(run, effort)))

    row["learned_ms"] = milliseconds(both, learned_sets)
    yield row
    row["fixed_ms"] = milliseconds(build(both_ways(fixed), fixed_sets[0]), fixed_sets)
    row["ratio"] = row["learned_ms"] / row["fixed_ms"]
    yield row
    for name, function, sets in (("fixed", fixed, fixed_sets), ("learned", learned, learned_sets)):
        without_g = [one[1:] for one in sets]
        row[f"{name}_forward_ms"] = milliseconds(build(function, without_g[0]), without_g)
    row["forward_ratio"] = row["learned_forward_ms"] / row["fixed_forward_ms"]
    yield row
    if length not in OTHER_WAY:
        return
    row["fixed_same_passes_ms"] = milliseconds(build(both_ways(fixed_in_three_passes), fixed_sets[0]), fixed_sets)
    row["same_passes_ratio"] = row["learned_ms"] / row["fixed_same_passes_ms"]
    yield row
    without_g = [one[1:] for one in fixed_sets]
    row["fixed_same_passes_forward_ms"] = milliseconds(build(fixed_in_three_passes, without_g[0]), without_g)
    row["same_passes_forward_ratio"] = row["learned_forward_ms"] / row["fixed_same_passes_forward_ms"]
    yield row


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.butterfly.kernel_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, of which the median counts (15)")
    parser.add_argument(
        "--points", type=int, nargs="+", default=[1024, 2048, 4096], help="lengths, powers of two (1024 2048 4096)"
    )
    parser.add_argument("--errors", action="store_true", help="measure the errors alone")
    options = parser.parse_args()
    if options.out.is_dir():
        parser.error(f"--out must be a file to write, such as {options.out / 'kernel_speed.json'}; got a folder.")
    if not options.out.parent.is_dir():
        parser.error(f"--out must be in a folder that exists; got {options.out}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {options.repeats}")
    if not set(options.points) <= {2**power for power in range(10, 20)}:
        parser.error(f"--points must be powers of two from 1024 to 524288; got {options.points}")
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", "") != "9.0":
        raise SystemExit(f"error: the kernels need a Hopper GPU; JAX finds {device.device_kind}.")
    record: dict[str, Any] = {
        "device": device.device_kind,
        "driver": driver_version(),
        "versions": package_versions(("jax", "jaxlib", "jax-cuda13-plugin")),
        "rows": {"features": FEATURES, "dtype": "bfloat16"},
    }
    rows: dict[int, Any] = {}
    effort = None if options.errors else Effort(repeats=options.repeats)
    for length in options.points:
        for row in measure(length, effort):
            rows[length] = row
            print(json.dumps(row), flush=True)
            write_atomically(options.out, json.dumps(record | {"results": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
