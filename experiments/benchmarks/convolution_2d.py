r"""Times `long_conv_2d` against `jnp.fft.rfft2` of images padded to twice their size, on this machine's device.

    python -m experiments.benchmarks.convolution_2d --out images.json

Square images, kernels as large as they, not causal along either axis. For each size, dtype and pass (the convolution,
or with it its gradient in image and kernel): the median time of a call, and the relative L2 error of the result against
`rfft2` in float64 on the host, of one image. A row whose implementation refuses the request says why. Nothing but JAX
and this repository is needed. Takes about a minute on a GPU; `--quick` takes seconds and times nothing well.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.record import here
from flashbutterfly_jax import long_conv_2d
from flashbutterfly_jax.typing import Implementation
from pallas_kernels.records import write_atomically
from pallas_kernels.timing import Effort, host_round, seconds_per_call

RIVAL = "rfft2"
OURS: tuple[Implementation, ...] = ("xla", "mosaic_gpu")


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation on one case."""

    size: int
    dtype: str
    gradient: bool
    implementation: str
    batch: int
    features: int
    ms: float | None = None
    error: float | None = None
    reason: str | None = None
    """Why there is no time."""


def by_rfft2(u: Any, quadrants: Any, *, fft: Any = jnp) -> Any:
    """The convolution as it is written by hand: the four quadrants around lag 0 of one periodic kernel of 2H x 2W."""
    size = u.shape[-1]
    rows = []
    for a in (0, 2):
        forward, reverse = quadrants[a], fft.flip(quadrants[a + 1], -1)
        rows.append(fft.concatenate([forward, reverse], -1))
    # Index 2N - 1 is lag -1, the first tap of a reverse quadrant; index N, its last one, reaches past the image.
    kernel = fft.concatenate([rows[0], fft.flip(rows[1], -2)], -2)
    spectrum = fft.fft.rfft2(u, (2 * size, 2 * size)) * fft.fft.rfft2(kernel)
    return fft.fft.irfft2(spectrum, (2 * size, 2 * size))[..., :size, :size].astype(u.dtype)


def convolution(name: str) -> Callable:
    for ours in OURS:
        if name == ours:
            return functools.partial(long_conv_2d, implementation=ours)
    return lambda u, kernel: by_rfft2(u.astype(jnp.float32), kernel).astype(u.dtype)


def timed(row: Row, effort: Effort) -> Row:
    """The row with what was measured, or why not."""
    keys = jax.random.split(jax.random.key(0), 2)
    u = jax.random.normal(keys[0], (row.batch, row.features, row.size, row.size), row.dtype)
    kernel = jax.random.normal(keys[1], (4, row.features, row.size, row.size)) / row.size
    convolve = convolution(row.implementation)

    def half_square(u, kernel):
        return 0.5 * jnp.sum(jnp.square(convolve(u, kernel).astype(jnp.float32)))

    call = jax.jit(jax.grad(half_square, argnums=(0, 1)) if row.gradient else convolve)
    try:
        got = np.asarray(jax.jit(convolve)(u, kernel)[0], np.float64)
        seconds = seconds_per_call(host_round(lambda pair: call(*pair), [(u, kernel)], jax.block_until_ready), effort)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as refusal:
        return dataclasses.replace(row, reason=str(refusal).split("\n")[0])
    want = by_rfft2(np.asarray(u[0], np.float64), np.asarray(kernel, np.float64), fft=np)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return dataclasses.replace(row, ms=1e3 * float(np.median(seconds)), error=error)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.convolution_2d",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128], help="pixels along a side")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--features", type=int, default=256, help="of each")
    parser.add_argument("--out", type=Path, help="file to write the rows to, as JSON")
    parser.add_argument("--quick", action="store_true", help="small, and with few repetitions")
    settings = parser.parse_args(argv)
    for name, values in ("sizes", settings.sizes), ("batch", [settings.batch]), ("features", [settings.features]):
        if min(values) < 1:
            parser.error(f"--{name} must be at least 1; got {min(values)}")
    if settings.out is not None and not settings.out.parent.is_dir():
        parser.error(f"--out must be in a folder that exists; got {settings.out}")
    return settings


def main(argv: Sequence[str] | None = None) -> list[Row]:
    settings = parse(argv)
    effort = Effort(repeats=3, round_seconds=0.001, limit_seconds=0.1) if settings.quick else Effort()
    batch, features = (1, 2) if settings.quick else (settings.batch, settings.features)
    record = here({"batch": batch, "features": features, "quick": settings.quick})
    print(f"{record.device}, {record.date}, jax {jax.__version__}; {batch} images of {features} features")
    rows = []
    for size in settings.sizes:
        for dtype in settings.dtypes:
            for gradient in (False, True):
                for implementation in (RIVAL, *OURS):
                    row = timed(Row(size, dtype, gradient, implementation, batch, features), effort)
                    found = row.reason or f"{row.ms:10.3f} ms   error {row.error:.1e}"
                    what = "gradient" if gradient else "forward "
                    print(f"{size:4} x {size:<4} {dtype:9} {what} {implementation:11} {found}", flush=True)
                    rows.append(row)
    if settings.out is not None:
        fields = dataclasses.asdict(record) | {"rows": [dataclasses.asdict(row) for row in rows]}
        write_atomically(settings.out, json.dumps(fields, indent=1, allow_nan=False) + "\n")
    return rows


if __name__ == "__main__":
    main()
