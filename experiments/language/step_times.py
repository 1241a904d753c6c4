"""Tokens per second of training steps: H3 with long convolutions against H3 and a Transformer, on made-up tokens.

    python -m experiments.language.step_times --output reports/step_times.json

Needs the library alone. All models have the same backbone, optimizer and tokens in a step; the Transformer has rotary
positions and, on a GPU, cuDNN's flash attention. Each is compiled, warmed up, and timed step by step on the host.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flashbutterfly_jax as fb
from experiments.common.initialization import quickly_compiled_random_bits
from experiments.language.flop import training_flop
from flashbutterfly_jax.models.language import Size
from pallas_kernels.records import package_versions, write_atomically

type Kind = Literal["h3_long_conv", "h3", "transformer"]
KINDS: tuple[Kind, ...] = ("h3_long_conv", "h3", "transformer")
WARM_UP = 3
VOCAB = 50_264


@dataclasses.dataclass(frozen=True)
class Case:
    """One model at one length."""

    kind: Kind
    size: Size
    length: int
    tokens: int
    """In a step, over all of its sequences."""
    steps: int
    remat: Literal["none", "dots", "full"]
    dtype: str = "bfloat16"

    @property
    def batch_size(self) -> int:
        return max(1, self.tokens // self.length)

    @property
    def attention(self) -> Literal["cudnn", "xla"]:
        return "cudnn" if jax.default_backend() == "gpu" else "xla"

    @property
    def mixer(self) -> str:
        return "attention" if self.kind == "transformer" else self.kind

    def model(self) -> fb.linen.LanguageModel:
        arguments = dict(self.size.arguments)
        if self.kind == "transformer":
            arguments["attention_layers"] = range(self.size.num_layers)
        else:
            arguments["mixer"] = (
                fb.linen.H3 if self.kind == "h3" else functools.partial(fb.linen.H3LongConv, kernel_length=self.length)
            )
        attention = functools.partial(
            fb.linen.CausalAttention, rotary=self.kind == "transformer", implementation=self.attention
        )
        return fb.linen.LanguageModel(
            vocab_size=VOCAB,
            attention=attention,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
            **arguments,
        )


def measure(case: Case) -> dict[str, Any]:
    """The row of a case; one that fails says why."""
    row = {
        "model": case.kind,
        "length": case.length,
        "batch_size": case.batch_size,
        "attention": case.attention,
        "remat": case.remat,
        "dtype": case.dtype,
    }
    try:
        return {**row, "status": "measured", **timed(case)}
    except Exception as error:  # out of memory, or a kernel that a device does not have: the other rows go on
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}


def timed(case: Case) -> dict[str, Any]:
    """Seconds of a step, and what they mean."""
    model = case.model()
    optimizer = fb.optim.adamw(6e-4, weight_decay=0.1, warmup_steps=100, total_steps=10_000)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    shape = (case.batch_size, case.length + 1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, shape), jnp.int32)

    @jax.jit
    def initialize() -> tuple[Any, Any]:
        params = model.init(jax.random.key(0), tokens[:1, :8], deterministic=True)["params"]
        return params, optimizer.init(params)

    def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens[:, :-1], deterministic=True)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    with quickly_compiled_random_bits():
        params, state = initialize()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    start = time.perf_counter()
    compiled = step.lower(params, state, tokens).compile()
    compilation = time.perf_counter() - start
    seconds, losses = [], []
    for _ in range(WARM_UP + case.steps):
        start = time.perf_counter()
        params, state, loss = compiled(params, state, tokens)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"losses {losses[:3]} are not finite")
    quartiles = statistics.quantiles(seconds[WARM_UP:], n=4)
    memory = compiled.memory_analysis()
    flop = training_flop(_Shape(case), VOCAB) * case.batch_size
    return {
        "parameters": count,
        "seconds": quartiles[1],
        "seconds_quartiles": [quartiles[0], quartiles[2]],
        "tokens_per_second": case.batch_size * case.length / quartiles[1],
        "model_flop_per_second": flop / quartiles[1],
        "compilation_seconds": round(compilation, 1),
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        "first_loss": losses[0],
    }


class _Shape:
    """A case as `training_flop` sees it."""

    def __init__(self, case: Case) -> None:
        self.mixer, self.length = case.mixer, case.length
        self.features, self.num_layers = case.size.features, case.size.num_layers
        self.attention_layers = case.size.attention_layers


def table(rows: list[dict[str, Any]]) -> str:
    """Tokens per second by length and model, and the ratio to the Transformer."""
    lines = [f"{'L':>7}  {'model':<14}{'batch':>6}{'ms/step':>10}{'tokens/s':>12}{'TFLOP/s':>9}{'to Transformer':>16}"]
    rivals = {row["length"]: row for row in rows if row["model"] == "transformer" and row["status"] == "measured"}
    for row in rows:
        start = f"{row['length']:>7}  {row['model']:<14}{row['batch_size']:>6}"
        if row["status"] != "measured":
            lines.append(f"{start}  {row['reason'][:70]}")
            continue
        rival = rivals.get(row["length"])
        ratio = f"{row['tokens_per_second'] / rival['tokens_per_second']:.2f}" if rival else ""
        lines.append(
            f"{start}{1e3 * row['seconds']:>10.1f}{row['tokens_per_second']:>12,.0f}"
            f"{row['model_flop_per_second'] / 1e12:>9.1f}{ratio:>16}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints each row as it is there, and writes all after each."""
    parser = argparse.ArgumentParser(prog="python -m experiments.language.step_times", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", default="125M", choices=fb.models.SIZES, help="of the models")
    parser.add_argument("--models", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32_768], help="of the sequences")
    parser.add_argument("--tokens", type=int, default=32_768, help="in a step, over all of its sequences")
    parser.add_argument("--steps", type=int, default=10, help=f"that are timed, after {WARM_UP}")
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"), help="of the layers")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the computation")
    parser.add_argument("--output", type=Path, default=Path("reports/step_times.json"), help="JSON, replaced whole")
    options = parser.parse_args(arguments)
    for name in ("tokens", "steps", *(["lengths"] if min(options.lengths) < 1 else [])):
        value = getattr(options, name)
        if name == "lengths" or value < (2 if name == "steps" else 1):
            parser.error(f"{name} must be at least {2 if name == 'steps' else 1}; got {value}.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": package_versions(("jax", "jaxlib", "flax", "optax")),
        "settings": {name: str(value) for name, value in vars(options).items() if name != "output"},
        "rows": (rows := []),
    }
    for length in options.lengths:
        for kind in options.models:
            size = fb.models.SIZES[options.size]
            case = Case(kind, size, length, options.tokens, options.steps, options.remat, options.dtype)
            rows.append(measure(case))
            write_atomically(options.output, json.dumps(record, indent=1) + "\n")
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{record['device']}, {options.dtype}\n{table(rows)}\n\n{options.output}")


if __name__ == "__main__":
    main()
