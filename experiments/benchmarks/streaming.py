"""Times a token of a causal long convolution that arrives step by step, over its position, on this machine's device.

    python -m experiments.benchmarks.streaming

Three ways to the same numbers: tiles (`fb.long_conv_stream`), a sum over a cache of all steps so far (its
`method="direct"`, with a cache as long as the position), and naive recomputation, which convolves the whole prefix anew
for its last step. The tiles' cost is uneven, so a token's is the mean over the second half of all steps up to the
position, in one `jax.lax.scan`; the sum's is the mean over a scan of a few steps. Medians over the rounds; on a CPU of
the process's time on all cores, which other programs disturb least, and by the clock on a GPU. Needs the package, rich
and matplotlib. Writes `streaming_DEVICE_DATE.json` after every row and a log-log figure at the end; five minutes on two
busy CPU cores with five rounds. Expected: the tiles' line is nearly flat, the other two rise as the position.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.progress import track
from rich.table import Table

import flashbutterfly_jax as fb
from experiments.benchmarks.convolution import positive, slug
from experiments.benchmarks.record import here
from pallas_kernels.records import write_atomically

METHODS = {
    "tiled": ("#D55E00", "o", "tiles, O(log² L)"),
    "direct": ("#0072B2", "s", "sum over an O(L) cache"),
    "recompute": ("#000000", "^", "FFT of the whole prefix"),
}
TOLERANCE = 1e-5  # of float32 results, relative to the largest; measured 3.1e-7


@dataclasses.dataclass(frozen=True)
class Row:
    """A token at one position by one method."""

    method: str
    position: int
    microseconds: float
    """Median over the rounds, of the clock named in the record."""
    microseconds_on_the_clock: float
    quartiles: tuple[float, float]
    error: float
    """Of the last token: max |got - want| over max |want|, want in float64."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    settings = parse(argv)
    settings.out.mkdir(parents=True, exist_ok=True)
    record = here({key: value for key, value in vars(settings).items() if key != "out"})
    fields = dataclasses.asdict(record) | {"clock": "wall" if record.platform == "gpu" else "process"}
    path = settings.out / f"{'_'.join(['streaming', slug(record.device), record.date[:19].replace(':', '')])}.json"
    random = np.random.default_rng(0)
    u = random.standard_normal((settings.batch, settings.features, max(settings.positions)))
    kernel = random.standard_normal((settings.features, max(settings.positions)))
    rows: list[Row] = []
    for position in track(settings.positions, description="positions", console=Console(stderr=True)):
        for method in METHODS:
            rows.append(measure(method, u[..., :position], kernel, settings.repeats, fields["clock"]))
            text = json.dumps(fields | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1, allow_nan=False)
            write_atomically(path, text + "\n")
    draw(fields, rows, path.with_suffix(".png"))
    show(fields, rows)
    print(f"wrote {path} and its .png")
    if wrong := [row for row in rows if row.error > TOLERANCE]:
        raise SystemExit(f"these are not the convolution: {wrong}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.streaming", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = [2**i for i in range(10, 17)]
    parser.add_argument("--positions", type=positive, nargs="+", default=default, help="steps so far, even numbers")
    parser.add_argument("--batch", type=positive, default=1, help="sequences")
    parser.add_argument("--features", type=positive, default=64, help="features of each, in float32")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds, of which the median counts")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"), help="folder for the JSON and PNG")
    settings = parser.parse_args(argv)
    if odd := [position for position in settings.positions if position % 2]:
        parser.error(f"--positions must be even, half of the steps being timed; got {odd}")
    settings.positions.sort()
    return settings


def measure(method: str, u: np.ndarray, kernel: np.ndarray, repeats: int, clock: str) -> Row:
    """One row: the last token of u, where the kernel of the tiles reaches further than that."""
    position = u.shape[-1]
    last = (kernel[:, :position][:, ::-1] * u).sum(-1)
    sequence, taps = jnp.asarray(u, jnp.float32), jnp.asarray(kernel, jnp.float32)
    call: Callable[[], Any]
    if method == "recompute":
        tokens, call = 1, functools.partial(recompute, sequence, taps[:, :position])
    elif method == "direct":
        tokens = min(32, position // 2)
        stream = fb.long_conv_stream(taps[:, :position], max_length=position, method="direct")
        state, _ = stream.prefill(sequence[..., :-tokens])
        call = functools.partial(steps, stream, state, sequence[..., -tokens:])
    else:
        tokens = position // 2
        stream = fb.long_conv_stream(taps, max_length=taps.shape[-1])
        # By steps and not as a prompt, from whose end the tiles would be counted.
        state, _ = steps(stream, stream.init(sequence.shape[:1]), sequence[..., :-tokens])
        call = functools.partial(steps, stream, state, sequence[..., -tokens:])
    y = np.asarray(call()[-1], np.float64)
    seconds = np.array([timed(call) for _ in range(repeats)]) * 1e6 / tokens
    chosen = seconds[:, 0 if clock == "wall" else 1]
    low, high = np.quantile(chosen, (0.25, 0.75)).tolist()
    error = float(np.abs(y - last).max() / np.abs(last).max())
    return Row(method, position, float(np.median(chosen)), float(np.median(seconds[:, 0])), (low, high), error)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock and of this process."""
    started = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - started[0], time.process_time() - started[1]


@jax.jit
def steps(stream, state, u: Float[Array, "B D L"]):
    """The state after them, and y of the last one."""

    def step(carry, u_t):
        state, y_t = stream.step(carry[0], u_t)
        return (state, y_t), None

    return jax.lax.scan(step, (state, u[..., 0]), jnp.moveaxis(u, -1, 0))[0]


@jax.jit
def recompute(u: Float[Array, "B D L"], kernel: Float[Array, "D L"]) -> tuple[Float[Array, "B D"]]:
    """The last step of the whole convolution."""
    return (fb.long_conv(u, kernel, implementation="xla")[..., -1],)


def draw(fields: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Writes the figure."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axis = figure.subplots()
        for method, (color, marker, label) in METHODS.items():
            line = [(row.position, row.microseconds) for row in rows if row.method == method]
            axis.plot(*zip(*line, strict=True), color=color, marker=marker, markersize=5, label=label)
        of = "of the process, all cores" if fields["clock"] == "process" else "on the clock"
        axis.set(xscale="log", yscale="log", xlabel="position in the sequence", ylabel=f"microseconds a token, {of}")
        positions = sorted({row.position for row in rows})
        axis.set_xticks(positions, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in positions])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(visible=True, which="major", color="#E6E6E6", linewidth=0.6)
        axis.legend(frameon=False)
        settings = fields["settings"]
        axis.set_title(
            f"One step of a causal long convolution, B = {settings['batch']}, D = {settings['features']}, float32\n"
            f"{fields['device']}, {fields['date'][:10]}, jax {fields['versions']['jax']}",
            loc="left",
            fontsize=9,
        )
        figure.savefig(path, dpi=160, facecolor="white")


def show(fields: dict[str, Any], rows: Sequence[Row]) -> None:
    table = Table(title=f"Microseconds a token on {fields['device']}, of the {fields['clock']}'s time")
    for column in ("position", *METHODS, "direct / tiled", "recompute / tiled", "largest error"):
        table.add_column(column, justify="right")
    for position in dict.fromkeys(row.position for row in rows):
        found = {row.method: row for row in rows if row.position == position}
        times = {method: found[method].microseconds for method in METHODS}
        ratios = [f"{times[method] / times['tiled']:.1f}x" for method in ("direct", "recompute")]
        worst = max(row.error for row in found.values())
        table.add_row(f"{position:,}", *(f"{times[m]:.4g}" for m in METHODS), *ratios, f"{worst:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
