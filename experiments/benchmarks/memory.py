"""Peak memory of the long convolution and of training on an H200, from programs compiled for it without a GPU.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.memory

XLA's figure for a program as compiled: arguments, results and everything between at the worst moment. It leaves out
what cuFFT takes for itself while it runs and what an allocator wastes. The convolution is causal, of bfloat16 sequences
with float32 taps as long as they are; forward + backward gives y and both gradients. Training is one step of
`linen.SequenceClassifier` with `fb.optim.adamw`: six layers in bfloat16 with float32 parameters, state donated, no
remat. Writes `memory_nvidia_h200_DATE.json` after every row and prints the tables. Needs the `cuda-aot` extra and rich;
the fused kernel takes a minute or so of compiling for each row on two CPU cores.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX looks for devices: nothing runs here

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.progress import Progress

import flashbutterfly_jax as fb
from experiments.benchmarks import hopper
from experiments.benchmarks.convolution import positive
from experiments.benchmarks.implementations import by_hand, by_library
from experiments.benchmarks.record import here
from pallas_kernels.records import package_versions, write_atomically

IMPLEMENTATIONS = ("jnp_fft", "xla", "butterfly", "mosaic_gpu")
PROGRAMS = ("forward", "forward+backward", "training")
LAYERS, CLASSES = 6, 2


@dataclasses.dataclass(frozen=True)
class Row:
    """One program."""

    program: str
    implementation: str
    length: int
    peak_bytes: int | None = None
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    reason: str | None = None
    """Why there are no figures."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles, prints and writes."""
    settings = parse(argv)
    if absent := hopper.missing():
        raise SystemExit(f"compiling for a GPU needs the cuda-aot extra: {', '.join(absent)} not installed.")
    os.environ["PATH"] = hopper.search_path()
    settings.out.mkdir(parents=True, exist_ok=True)
    fields = dataclasses.asdict(here({key: value for key, value in vars(settings).items() if key != "out"}))
    fields |= {"device": "NVIDIA H200, compiled for without one", "platform": "gpu"}
    fields["versions"] |= package_versions(hopper.WHEELS)
    path = settings.out / f"memory_nvidia_h200_{fields['date'][:19].replace(':', '')}.json"
    wanted = list(cases(settings))
    rows: list[Row] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("programs", total=len(wanted))
        for program, name, length in wanted:
            progress.update(task, description=f"{program}, {name}, L = {length:,}")
            rows.append(row(program, name, length, settings.batch, settings.features))
            text = json.dumps(fields | {"rows": [dataclasses.asdict(each) for each in rows]}, indent=1)
            write_atomically(path, text + "\n")
            progress.advance(task)
    print(markdown(rows))
    print(f"\nwrote {path}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--lengths", type=positive, nargs="+", default=[4096, 16384, 65536], help="of the convolution")
    parser.add_argument("--training-lengths", type=positive, nargs="+", default=[65536], help="of training")
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--features", type=positive, default=256)
    parser.add_argument("--programs", choices=PROGRAMS, nargs="+", default=list(PROGRAMS))
    parser.add_argument(
        "--implementations", choices=IMPLEMENTATIONS, nargs="+", default=["jnp_fft", "xla", "mosaic_gpu"]
    )
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"), help="folder for the JSON")
    return parser.parse_args(argv)


def cases(settings: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Those of the fused kernel, which take longest to compile, in the end."""
    for name in sorted(settings.implementations, key=IMPLEMENTATIONS.index):
        for program in settings.programs:
            if program != "training":
                yield from ((program, name, length) for length in settings.lengths)
            elif name != "jnp_fft":  # a layer takes implementations of this library alone
                yield from ((program, name, length) for length in settings.training_lengths)


def row(program: str, name: str, length: int, batch: int, features: int) -> Row:
    """Compiles one program; what an implementation refuses becomes the reason."""
    try:
        if program == "training":
            function, arguments = training(name, length, batch, features)
            donated: tuple[int, ...] = (0, 1)
        else:
            function, arguments = convolution(program, name, length, batch, features)
            donated = ()
        sharding = SingleDeviceSharding(hopper.devices()[0])
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
        stats = jax.jit(function, donate_argnums=donated).lower(*arguments).compile().memory_analysis()
        assert stats is not None
    except NotImplementedError as error:
        return Row(program, name, length, reason=str(error).split("\n")[0])
    return Row(
        program,
        name,
        length,
        peak_bytes=stats.peak_memory_in_bytes,
        argument_bytes=stats.argument_size_in_bytes,
        temporary_bytes=stats.temp_size_in_bytes,
    )


def convolution(program: str, name: str, length: int, batch: int, features: int) -> tuple[Callable, tuple]:
    """The causal convolution and its abstract arguments."""
    u = jax.ShapeDtypeStruct((batch, features, length), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((features, length), jnp.float32)

    def forward(u, kernel):
        if name == "jnp_fft":
            return by_hand(u, kernel, circular=False)
        return by_library(u, kernel, circular=False, implementation=name)

    def both(u, kernel, cotangent):
        y, transposed = jax.vjp(forward, u, kernel)
        return y, *transposed(cotangent)

    return (forward, (u, kernel)) if program == "forward" else (both, (u, kernel, u))


def training(name: Any, length: int, batch: int, features: int) -> tuple[Callable, tuple]:
    """A step of the classifier of pixels and its abstract arguments; the first two are its state."""

    def layer(**options: Any):
        return fb.linen.LongConv(**options, squash_threshold=0.001, implementation=name)

    model = fb.linen.SequenceClassifier(
        num_classes=CLASSES,
        features=features,
        num_layers=LAYERS,
        kernel_length=length,
        input_features=1,
        layer=layer,
        dtype=jnp.bfloat16,
    )
    optimizer = fb.optim.adamw(0.001, total_steps=10**6)
    x = jax.ShapeDtypeStruct((batch, length, 1), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    # The parameters' shapes are those of any implementation, and a short sequence has them too.
    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 1), jnp.bfloat16))["params"]
    state = jax.eval_shape(optimizer.init, params)

    def loss_of(params, x, labels):
        logits = jnp.asarray(model.apply({"params": params}, x), jnp.float32)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, state, x, labels):
        loss, gradient = jax.value_and_grad(loss_of)(params, x, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step, (params, state, x, labels)


def markdown(rows: Sequence[Row]) -> str:
    """Peak gigabytes, a table for each program, with the ratio to `jnp.fft` where it was compiled."""
    tables = []
    for program in dict.fromkeys(each.program for each in rows):
        peaks = {(each.length, each.implementation): each.peak_bytes for each in rows if each.program == program}
        names = list(dict.fromkeys(name for _, name in peaks))
        lines = [
            f"| {program}: L | {' | '.join(f'{name}, GB' for name in names)} |",
            "| ---: " * (len(names) + 1) + "|",
        ]
        for length in sorted({length for length, _ in peaks}):
            base = peaks.get((length, "jnp_fft"))
            cells = [_cell(peaks.get((length, name)), None if name == "jnp_fft" else base) for name in names]
            lines.append(f"| {length:,} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    reasons = [f"{each.program}, {each.implementation}, {each.length:,}: {each.reason}" for each in rows if each.reason]
    return "\n\n".join(tables + [f"Not compiled: {'; '.join(reasons)}."] * bool(reasons))


def _cell(peak: int | None, base: int | None) -> str:
    if peak is None:
        return "not compiled"
    return f"{peak / 1e9:.3g}" + (f" (1 / {base / peak:.1f})" if base else "")


if __name__ == "__main__":
    main()
