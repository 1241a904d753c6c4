"""Times the forward kernel with learned blocks against the fixed one, on a Hopper GPU.

    python -m experiments.butterfly.kernel_speed --out learned_kernel.json

For 1024, 2048 and 4096 steps, B = 64, D = 768, bfloat16, the transform of the taps inside the timing on both sides:
milliseconds of the fixed kernel, of the learned one in each configuration that fits, their ratio, and the learned
kernel's relative L2 error against float32 products with blocks that are not Fourier's. A minute on one GPU; needs jax
and numpy alone.
"""

import argparse
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashbutterfly_jax.functional.butterfly import (
    Chain,
    LearnedButterfly,
    Plan,
    learned_reference_forward,
    learned_reference_spectrum,
    stage_blocks,
)
from pallas_kernels.fft_conv import fft_conv, learned_sm90
from pallas_kernels.fft_conv.config import N1, SHARED_MEMORY_BYTES, Config
from pallas_kernels.records import driver_version, package_versions, write_atomically
from pallas_kernels.timing import Effort, host_round, seconds_per_call

BATCH, FEATURES = 64, 768
SETS = 3
"""Of inputs that take turns, so that none is in the cache of 50 MB when its turn comes."""


def blocks_of(n2: int) -> tuple[learned_sm90.Blocks, jax.Array, jax.Array]:
    """Blocks of an imagined trained layer: the DFT and a third of it in noise; then those of the taps."""
    config = LearnedButterfly("right_angle", (N1, n2), per_stage=True, learn_inverse=True)
    tree = config.init(jax.random.key(0), FEATURES, N1 * n2)
    keys = iter(jax.random.split(jax.random.key(1), 6))
    tree = jax.tree.map(lambda block: block + 0.3 * jax.random.normal(next(keys), block.shape), tree)
    there, of_taps, back = (
        stage_blocks(tree[name], Plan((N1, n2)), 0.25, inverse=name == "output")
        for name in ("input", "kernel", "output")
    )
    return learned_sm90.Blocks(there[0], there[1].T, back[1].T, back[0]), of_taps[0], of_taps[1].T


def configurations(n2: int) -> list[Config]:
    """Those that fit a block's shared memory, most warpgroups first."""
    every = (Config(n2, groups, slots) for groups, slots in itertools.product((4, 3, 2), (2, 1)))
    return [config for config in every if learned_sm90.shared_memory(config) + 1024 <= SHARED_MEMORY_BYTES]


def error(u: jax.Array, taps: jax.Array, chain: Any, got: jax.Array, n2: int) -> float:
    """The relative L2 error of eight rows, against float32 products."""
    blocks, f1, f2 = chain
    rows = u[:8, :8].astype(jnp.float32).reshape(8, 8, N1, n2)
    spectrum = learned_reference_spectrum(taps[None, :8].reshape(1, 8, N1, n2), f1, f2)
    with jax.default_matmul_precision("highest"):
        want = learned_reference_forward(rows, spectrum, Chain(*blocks)).reshape(8, 8, -1)
    difference = np.asarray(got[:8, :8], np.float64) - np.asarray(want, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(want, np.float64)))


def measure(n2: int, effort: Effort) -> dict[str, Any]:
    """The rows of one length."""
    length = N1 * n2
    keys = jax.random.split(jax.random.key(2), 2 * SETS)
    sets = [
        (
            jax.random.normal(keys[2 * i], (BATCH, FEATURES, length), jnp.bfloat16),
            jax.random.normal(keys[2 * i + 1], (FEATURES, length)) / math.sqrt(length),
        )
        for i in range(SETS)
    ]
    chain = blocks_of(n2)

    def milliseconds(function: Any) -> float:
        compiled = jax.jit(function).lower(*sets[0]).compile()
        run = host_round(lambda inputs: compiled(*inputs), sets, jax.block_until_ready)
        return 1e3 * float(np.median(seconds_per_call(run, effort)))

    fixed = milliseconds(lambda u, taps: fft_conv(u, taps[None])[:, 0])
    rows = []
    for config in configurations(n2):
        learned = functools.partial(_learned, chain=chain, config=config)
        taken = milliseconds(learned)
        got = jax.jit(learned)(*sets[0])
        row = {
            "warpgroups": config.warpgroups,
            "spectrum_slots": config.spectrum_slots,
            "default": config == learned_sm90.default_config(n2),
            "ms": taken,
            "ratio": taken / fixed,
            "error": error(*sets[0], chain, got, n2),
        }
        print(f"L = {length}: fixed {fixed:.3f} ms, learned {taken:.3f} ms, {row}", flush=True)
        rows.append(row)
    return {"length": length, "fixed_ms": fixed, "learned": rows}


def _learned(u: jax.Array, taps: jax.Array, *, chain: Any, config: Config) -> jax.Array:
    blocks, f1, f2 = chain
    return learned_sm90.learned_fft_conv(u, taps, blocks, f1, f2, config)


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
