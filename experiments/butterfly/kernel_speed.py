"""Times the forward kernel with learned blocks against the fixed one, on a Hopper GPU.

    python -m experiments.butterfly.kernel_speed --out learned_kernel.json

For 1024, 2048 and 4096 steps, B = 64, D = 768, bfloat16, the transform of the taps inside the timing on both sides:
milliseconds of the fixed kernel, of the learned one in some configurations, their ratio, and the learned
kernel's relative L2 error against float32 products with blocks that are not Fourier's. A minute on one GPU; needs jax
and numpy alone.
"""

import argparse
import functools
import json
import math
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


CONFIGURATIONS = {16: ((4, 2), (3, 2), (2, 2)), 32: ((4, 2), (3, 2), (2, 2)), 64: ((4, 1), (3, 1), (2, 2))}
"""By second factor: warpgroups and slots for spectra to try."""


def blocks_of(butterfly: LearnedButterfly) -> dict[str, Any]:
    """Blocks of an imagined trained layer: the DFT and a third of it in noise."""
    tree = butterfly.init(jax.random.key(0), FEATURES, math.prod(butterfly.factors or ()))
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def error(u: jax.Array, taps: jax.Array, got: jax.Array, **layer: Any) -> float:
    """The relative L2 error of eight rows, against float32 products."""
    want = np.asarray(learned_long_conv(u[:8, :8].astype(jnp.float32), taps[:8], **layer), np.float64)
    return float(np.linalg.norm(np.asarray(got[:8, :8], np.float64) - want) / np.linalg.norm(want))


def measure(n2: int, effort: Effort) -> dict[str, Any]:
    """The rows of one length."""
    length = 64 * n2
    keys = jax.random.split(jax.random.key(2), 2 * SETS)
    sets = [
        (
            jax.random.normal(keys[2 * i], (BATCH, FEATURES, length), jnp.bfloat16),
            jax.random.normal(keys[2 * i + 1], (FEATURES, length)) / math.sqrt(length),
        )
        for i in range(SETS)
    ]
    butterfly = LearnedButterfly("right_angle", (64, n2), per_stage=True, learn_inverse=True)
    layer: dict[str, Any] = {"blocks": blocks_of(butterfly), "butterfly": butterfly}

    def milliseconds(function: Any) -> float:
        compiled = jax.jit(function).lower(*sets[0]).compile()
        run = host_round(lambda inputs: compiled(*inputs), sets, jax.block_until_ready)
        return 1e3 * float(np.median(seconds_per_call(run, effort)))

    fixed = milliseconds(functools.partial(long_conv, implementation="mosaic_gpu"))
    rows = []
    for warpgroups, slots in CONFIGURATIONS[n2]:
        options: dict[str, Any] = {"warpgroups": warpgroups, "spectrum_slots": slots}
        learned = functools.partial(learned_long_conv_mosaic_gpu, **layer, **options)
        taken = milliseconds(learned)
        got = jax.jit(learned)(*sets[0])
        row = {**options, "ms": taken, "ratio": taken / fixed, "error": error(*sets[0], got, **layer)}
        print(f"L = {length}: fixed {fixed:.3f} ms, learned {taken:.3f} ms, {row}", flush=True)
        rows.append(row)
    return {"length": length, "fixed_ms": fixed, "learned": rows}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, of which the median counts (15)")
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"--out must be in a folder that exists; got {options.out}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {options.repeats}")
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", "") != "9.0":
        raise SystemExit(f"error: the kernels need a Hopper GPU; JAX finds {device.device_kind}.")
    record = {
        "device": device.device_kind,
        "driver": driver_version(),
        "versions": package_versions(("jax", "jaxlib", "jax-cuda13-plugin")),
        "rows": {"batch": BATCH, "features": FEATURES, "dtype": "bfloat16"},
        "results": [measure(n2, Effort(repeats=options.repeats)) for n2 in (16, 32, 64)],
    }
    write_atomically(options.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
