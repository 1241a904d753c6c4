"""Times the kernels with learned blocks against the fixed ones, forward and backward, on a Hopper GPU.

    python -m experiments.butterfly.kernel_speed --out learned_kernel.json
    python -m experiments.butterfly.kernel_speed --out learned_errors.json --errors    # their errors alone, 1 minute

For 1024, 2048 and 4096 steps, B = 64, D = 768, bfloat16, the transform of the taps inside the timing on both sides:
milliseconds forward, and forward with the cotangents of everything that is learned: of u and the taps on both sides,
and of all six blocks on the learned one; their ratios; and the learned kernels' relative L2 errors against float64,
with blocks that are not Fourier's, of a cotangent that is zero but in 64 rows. Two minutes on one GPU; needs jax and
numpy alone.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashbutterfly_jax import LearnedButterfly, learned_long_conv, long_conv
from flashbutterfly_jax.functional.butterfly.mosaic_gpu import learned_long_conv_mosaic_gpu
from pallas_kernels.records import driver_version, package_versions, write_atomically
from pallas_kernels.timing import Effort, host_round, seconds_per_call

BATCH, FEATURES = 64, 768
SETS = 3
"""Of inputs that take turns, so that none is in the cache of 50 MB when its turn comes."""
SOME = slice(None, None, 8), slice(None, None, 96)
"""Rows of the batch and features whose results are compared with float64's."""


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


def measure(n2: int, effort: Effort) -> dict[str, Any]:
    """The rows of one length."""
    length = 64 * n2
    butterfly = LearnedButterfly("right_angle", (64, n2), per_stage=True, learn_inverse=True)
    blocks = blocks_of(butterfly)
    sets = []
    for i in range(SETS):
        g, u, taps = jax.random.split(jax.random.key(2 + i), 3)
        rows = (BATCH, FEATURES, length)
        sets.append(
            (
                jax.random.normal(g, rows, jnp.bfloat16),
                jax.random.normal(u, rows, jnp.bfloat16),
                jax.random.normal(taps, (FEATURES, length)) / math.sqrt(length),
            )
        )

    def fixed(u: jax.Array, taps: jax.Array) -> jax.Array:
        return long_conv(u, taps, implementation="mosaic_gpu")

    def learned(u: jax.Array, taps: jax.Array, blocks: Any) -> jax.Array:
        return learned_long_conv_mosaic_gpu(u, taps, blocks=blocks, butterfly=butterfly)

    def milliseconds(name: str, function: Callable[..., Any], inputs: list[Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*inputs[0]).compile()
        built = time.perf_counter() - start
        run = host_round(lambda arguments: compiled(*arguments), inputs, jax.block_until_ready)
        taken = 1e3 * float(np.median(seconds_per_call(run, effort)))
        print(f"L = {length}: {name} {taken:.3f} ms (compiled in {built:.0f} s)", flush=True)
        return taken, compiled

    with_blocks = [(*arguments, blocks) for arguments in sets]
    row: dict[str, Any] = {"length": length}
    for name, function, inputs in (("fixed", fixed, sets), ("learned", learned, with_blocks)):
        row[f"{name}_forward_ms"], _ = milliseconds(f"{name} forward", function, [x[1:] for x in inputs])
        row[f"{name}_ms"], compiled = milliseconds(f"{name} forward and backward", both_ways(function), inputs)
    row["forward_ratio"] = row["learned_forward_ms"] / row["fixed_forward_ms"]
    row["ratio"] = row["learned_ms"] / row["fixed_ms"]
    g, *arguments = with_blocks[0]
    sparse = jnp.zeros_like(g).at[SOME].set(g[SOME])
    row["errors"] = errors(compiled(sparse, *arguments), sparse, arguments, butterfly)
    print(f"L = {length}: {json.dumps({name: row[name] for name in ('forward_ratio', 'ratio', 'errors')})}", flush=True)
    return row


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, of which the median counts (15)")
    parser.add_argument("--factors", type=int, nargs="+", default=[16, 32, 64], help="second factors (16 32 64)")
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"--out must be in a folder that exists; got {options.out}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {options.repeats}")
    if not set(options.factors) <= {16, 32, 64}:
        parser.error(f"--factors must be among 16, 32 and 64; got {options.factors}")
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", "") != "9.0":
        raise SystemExit(f"error: the kernels need a Hopper GPU; JAX finds {device.device_kind}.")
    record = {
        "device": device.device_kind,
        "driver": driver_version(),
        "versions": package_versions(("jax", "jaxlib", "jax-cuda13-plugin")),
        "rows": {"batch": BATCH, "features": FEATURES, "dtype": "bfloat16"},
        "results": [measure(n2, Effort(repeats=options.repeats)) for n2 in options.factors],
    }
    write_atomically(options.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
