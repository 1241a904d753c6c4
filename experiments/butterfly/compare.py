"""Fixed against learned butterflies on handwritten digits: `python -m experiments.butterfly.compare --help`.

All seeds of a variant train at once, as one program that is vectorised over them. Each variant's result is written
when it is there; the same command goes on with what is missing.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flashbutterfly_jax as fb
from experiments.common.workdir import write_whole
from experiments.digits.data import upsample
from flashbutterfly_jax import LearnedButterfly
from pallas_kernels.records import package_versions

VARIANTS: dict[str, dict[str, Any]] = {
    "fixed, causal": {},
    "learned, causal": {"butterfly": LearnedButterfly("causal")},
    "learned, causal, per feature": {"butterfly": LearnedButterfly("causal", per_feature=True)},
    "fixed, bidirectional": {"bidirectional": True},
    "learned, right angle": {"butterfly": LearnedButterfly("right_angle")},
    "learned, right angle, inverse too": {"butterfly": LearnedButterfly("right_angle", learn_inverse=True)},
    "learned, padded": {"butterfly": LearnedButterfly("padded")},
    "learned, padded, per feature": {"butterfly": LearnedButterfly("padded", per_feature=True)},
}
"""Arguments of LongConv. Those below the fixed bidirectional one may look ahead, as that does."""


@dataclass(frozen=True)
class Options:
    """Compare fixed and learned butterflies on scikit-learn's digits: 1,397 images to train on and 400 to test."""

    out: Path = Path("reports/butterfly.json")
    """Results, one for each variant; those that are there are not made again."""

    side: int = 8
    """Pixels on a side, 8 as they are or more by interpolation: a sequence has side * side steps."""

    steps: int = 600
    """Of the optimiser."""

    batch_size: int = 32
    """Images in a step."""

    seeds: int = 5
    """Runs of each variant; a seed fixes the initialisation and the order of the images."""

    features: int = 32
    """Width of the model."""

    layers: int = 2
    """Residual blocks."""

    learning_rate: float = 0.01
    """Peak, of all but kernels and blocks."""

    kernel_learning_rate: float = 0.005
    """Peak, of kernels and learned blocks."""

    def __post_init__(self) -> None:
        least = {"side": 8, "steps": 20, "batch_size": 1, "seeds": 1, "features": 1, "layers": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}; got {getattr(self, name)}.")
        for name in ("learning_rate", "kernel_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}.")


class Split(NamedTuple):
    """Standardised pixels (rows, side * side, 1), and digits (rows,)."""

    pixels: jax.Array
    labels: jax.Array


def digits(side: int) -> tuple[Split, Split]:
    """The training and the test split, the same on every call."""
    source = load_digits()
    images = source.images.astype(np.float32)
    images = images if side == images.shape[-1] else upsample(images, side)
    pixels = images.reshape(len(images), side * side, 1)
    train, test, train_labels, test_labels = train_test_split(
        pixels, source.target.astype(np.int32), test_size=400, stratify=source.target, random_state=0
    )
    mean, deviation = train.mean(), train.std()
    return tuple(
        Split(jnp.asarray((x - mean) / deviation), jnp.asarray(y))
        for x, y in ((train, train_labels), (test, test_labels))
    )  # type: ignore[return-value]


def run(options: Options, variant: str, train: Split, test: Split) -> Iterator[dict[str, Any]]:
    """Trains all seeds of a variant; yields the steps done, in the end with the result."""
    layer = functools.partial(fb.linen.LongConv, squash_threshold=0.001, kernel_dropout_rate=0.2, **VARIANTS[variant])
    model = fb.linen.SequenceClassifier(
        num_classes=10, features=options.features, num_layers=options.layers, kernel_length=options.side**2, layer=layer
    )
    optimizer = fb.optim.adamw(
        options.learning_rate,
        kernel_learning_rate=options.kernel_learning_rate,
        weight_decay=0.05,
        warmup_steps=options.steps // 10,
        total_steps=options.steps,
    )

    def initialize(key):
        params = model.init(key, train.pixels[:1], deterministic=True)["params"]
        return params, optimizer.init(params)

    def loss_of(params, rows, key):
        rngs = {"dropout": key}
        logits: Any = model.apply({"params": params}, train.pixels[rows], deterministic=False, rngs=rngs)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, train.labels[rows]).mean()

    def step(state, key):
        params, moments = state
        order, dropout = jax.random.split(key)
        rows = jax.random.randint(order, (options.batch_size,), 0, len(train.labels))
        loss, gradient = jax.value_and_grad(loss_of)(params, rows, dropout)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    def accuracy(state):
        logits: Any = model.apply({"params": state[0]}, test.pixels, deterministic=True)
        return (logits.argmax(-1) == test.labels).mean()

    chunk = options.steps // 20
    keys = jax.random.split(jax.random.key(0), options.seeds)
    states = jax.jit(jax.vmap(initialize))(keys)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(states[0])) // options.seeds
    steps = jax.jit(jax.vmap(lambda state, keys: jax.lax.scan(step, state, keys)), donate_argnums=0)
    losses = jnp.zeros((options.seeds, 1))
    for start in range(0, options.steps, chunk):
        numbers = jnp.arange(start, min(start + chunk, options.steps))
        of_steps = jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers))(keys)  # noqa: B023
        states, losses = steps(states, of_steps)
        if not jnp.isfinite(losses).all():
            raise FloatingPointError(f"the loss of {variant} is not finite by step {start + chunk}.")
        yield {"steps": len(numbers)}
    scores = jax.jit(jax.vmap(accuracy))(states)
    yield {
        "steps": 0,
        "parameters": parameters,
        "accuracy": [float(score) for score in scores],
        "last_losses": [float(loss) for loss in losses.mean(1)],
    }


def table(results: dict[str, dict[str, Any]]) -> Table:
    """A row for each variant."""
    rows = Table("butterfly", "parameters", "test accuracy", "of seeds", "training loss at the end")
    for variant, result in results.items():
        scores, losses = np.array(result["accuracy"]), np.array(result["last_losses"])
        spread = f" ± {scores.std(ddof=1):.2%}" if len(scores) > 1 else ""
        each = " ".join(f"{score:.1%}" for score in scores)
        rows.add_row(variant, f"{result['parameters']:,}", f"{scores.mean():.2%}{spread}", each, f"{losses.mean():.3f}")
    return rows


def earlier(options: Options) -> dict[str, dict[str, Any]]:
    """Results of the same options.

    Raises:
      SystemExit: if the file is of others, or of something else.
    """
    if not options.out.exists():
        return {}
    try:
        record = json.loads(options.out.read_text())
        same = record["options"] == settings(options)
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise SystemExit(f"error: out must be new or results of this experiment; got {options.out}.") from None
    if not same:
        raise SystemExit(f"error: out must be of the same options; {options.out} is of {record['options']}.")
    return record["results"]


def settings(options: Options) -> dict[str, Any]:
    """What decides the numbers."""
    return {name: value for name, value in asdict(options).items() if name != "out"}


def main(options: Options) -> None:
    """Runs what is missing, and prints the table."""
    console = Console()
    results = earlier(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    train, test = digits(options.side)
    missing = [variant for variant in VARIANTS if variant not in results]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=options.steps * len(missing))
        for variant in missing:
            progress.update(task, description=variant)
            for report in run(options, variant, train, test):
                progress.advance(task, report.pop("steps"))
                if report:
                    results[variant] = report
            record = {
                "options": settings(options),
                "versions": package_versions(("jax", "flax", "optax")),
                "device": jax.devices()[0].device_kind,
                "results": results,
            }
            write_whole(options.out, json.dumps(record, indent=1).encode())
    console.print(table(results))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m experiments.butterfly.compare"))
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted. The same command goes on with what is missing.") from None
