"""Times a training step of `linen.SequenceClassifier` against the same model written by hand, on this machine's CPU.

    python -m experiments.benchmarks.train_step_cpu

One step is the loss, its gradient and AdamW, compiled, with donated state; no dropout. By hand means plain `jnp`, one
dictionary of parameters for each layer and a Python loop over them. Where PyTorch is installed the same model runs
there too. All take the same parameters and must agree on the loss before they are timed. They run in turn, and a ratio
is the median over the rounds, so that a busy machine disturbs all alike. Expected: at most 1. On two shared
cores it was 0.95 for the library and 0.79 with its layers unrolled, clock and CPU alike. It says nothing about a GPU.
"""

import dataclasses
import functools
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX looks for devices: this is a CPU benchmark wherever it runs

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table

import flashbutterfly_jax as fb

RATE, KERNEL_RATE, DECAY, STEPS = 0.004, 0.001, 0.05, 10**6
THRESHOLD, CHANNELS, CLASSES = 0.001, 2, 10


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    batch: int = 16
    """Sequences in a batch."""
    length: int = 1024
    """Pixels in a sequence, and taps in a kernel."""
    features: int = 64
    """Features of each layer."""
    layers: int = 4
    """Residual blocks."""
    repeats: int = 15
    """Rounds of one step each."""


class Run:
    """A compiled step and the state that it donates to itself."""

    def __init__(self, step: Callable, *state: Any, batch: tuple):
        started = time.perf_counter()
        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(*state, *batch).compile()
        self.compile_seconds = time.perf_counter() - started
        self.state, self.batch = jax.tree.map(jnp.copy, state), batch

    def __call__(self) -> float:
        *self.state, loss = self.step(*self.state, *self.batch)
        return float(loss)


def by_library(config: Config, params: Any, batch: tuple, *, scan_layers: bool) -> Run:
    """The step as a user of the library writes it."""
    model = make_model(config, scan_layers=scan_layers)
    optimizer = fb.optim.adamw(RATE, kernel_learning_rate=KERNEL_RATE, weight_decay=DECAY, total_steps=STEPS)

    def loss_of(params: Any, x: Array, labels: Array) -> Array:
        return cross_entropy(model.apply({"params": params}, x), labels)

    return Run(functools.partial(update, loss_of, optimizer), params, optimizer.init(params), batch=batch)


def by_hand(config: Config, params: Any, batch: tuple) -> Run:
    """The same without the library: one dictionary for each layer, a Python loop, two groups of AdamW."""
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(config.layers)]
    params = {"encoder": params["encoder"], "layers": layers, "head": params["head"]}
    schedule = optax.cosine_decay_schedule(1.0, STEPS)
    groups = {
        "kernel": optax.adamw(lambda step: KERNEL_RATE * schedule(step), weight_decay=0.0),
        "other": optax.adamw(lambda step: RATE * schedule(step), weight_decay=DECAY),
    }
    labels = jax.tree.map(lambda _: "other", params)
    for layer in labels["layers"]:
        layer["layer"]["kernel"] = "kernel"
    optimizer = optax.partition(groups, labels)

    def loss_of(params: Any, x: Array, labels: Array) -> Array:
        return cross_entropy(forward(params, x), labels)

    return Run(functools.partial(update, loss_of, optimizer), params, optimizer.init(params), batch=batch)


def forward(params: Any, x: Float[Array, "B L 1"]) -> Float[Array, "B classes"]:
    """The model in plain `jnp`."""
    x = x @ params["encoder"]["kernel"] + params["encoder"]["bias"]
    for block in params["layers"]:
        x = x + mixer(block["layer"], x)
        centred = x - x.mean(-1, keepdims=True)
        x = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        x = x * block["norm"]["scale"] + block["norm"]["bias"]
    return x.mean(1) @ params["head"]["kernel"] + params["head"]["bias"]


def mixer(params: Any, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """The long convolution layer in plain `jnp`."""
    batch, length, features = x.shape
    u, n = x.swapaxes(1, 2), 2 * length
    kernel = jnp.sign(params["kernel"]) * jax.nn.relu(jnp.abs(params["kernel"]) - THRESHOLD)
    y = jnp.fft.irfft(jnp.fft.rfft(u, n)[:, None] * jnp.fft.rfft(kernel, n), n)[..., :length]
    y = y + params["skip"][..., None] * u[:, None]
    h = jax.nn.gelu(y.reshape(batch, CHANNELS * features, length).swapaxes(1, 2), approximate=False)
    value, gate = jnp.split(h @ params["output"]["kernel"] + params["output"]["bias"], 2, axis=-1)
    return value * jax.nn.sigmoid(gate)


def update(loss_of: Callable, optimizer: optax.GradientTransformation, params: Any, state: Any, *batch: Array) -> tuple:
    """One step: (new parameters, new state, loss)."""
    loss, gradient = jax.value_and_grad(loss_of)(params, *batch)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def cross_entropy(logits: Float[Array, "B classes"], labels: Int[Array, "B"]) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_model(config: Config, *, scan_layers: bool = True) -> Any:
    return fb.linen.SequenceClassifier(
        num_classes=CLASSES,
        features=config.features,
        num_layers=config.layers,
        kernel_length=config.length,
        layer=functools.partial(fb.linen.LongConv, channels=CHANNELS, squash_threshold=THRESHOLD),
        scan_layers=scan_layers,
    )


def by_torch(config: Config, params: Any, batch: tuple) -> Callable[[], float]:
    """The same in PyTorch, with as many threads as there are cores."""
    import torch

    torch.set_num_threads(cores())
    x, labels = (torch.tensor(np.asarray(part)) for part in batch)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(config.layers)]
    tree = {"encoder": params["encoder"], "layers": layers, "head": params["head"]}
    tensors = jax.tree.map(lambda leaf: torch.tensor(np.array(leaf), requires_grad=True), tree)
    kernels = [block["layer"]["kernel"] for block in tensors["layers"]]
    others = [leaf for leaf in jax.tree.leaves(tensors) if not any(leaf is kernel for kernel in kernels)]
    optimizer = torch.optim.AdamW(
        [
            {"params": kernels, "lr": KERNEL_RATE, "weight_decay": 0.0},
            {"params": others, "lr": RATE, "weight_decay": DECAY},
        ]
    )
    functional, n = torch.nn.functional, 2 * config.length

    def torch_mixer(params: Any, x: Any) -> Any:
        u = x.transpose(1, 2)
        kernel = torch.sign(params["kernel"]) * torch.relu(params["kernel"].abs() - THRESHOLD)
        y = torch.fft.irfft(torch.fft.rfft(u, n)[:, None] * torch.fft.rfft(kernel, n), n)[..., : config.length]
        y = y + params["skip"][..., None] * u[:, None]
        h = functional.gelu(y.flatten(1, 2).transpose(1, 2))
        return functional.glu(h @ params["output"]["kernel"] + params["output"]["bias"])

    def step() -> float:
        h = x @ tensors["encoder"]["kernel"] + tensors["encoder"]["bias"]
        for block in tensors["layers"]:
            h = h + torch_mixer(block["layer"], h)
            h = functional.layer_norm(h, (config.features,), block["norm"]["scale"], block["norm"]["bias"])
        logits = h.mean(1) @ tensors["head"]["kernel"] + tensors["head"]["bias"]
        loss = functional.cross_entropy(logits, labels.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def time_in_turn(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, Float[np.ndarray, "2 repeats"]]:
    """Seconds of each step on the clock and on the CPU. Every other round is in reverse."""
    first = {name: step() for name, step in steps.items()}
    np.testing.assert_allclose(list(first.values()), first["by hand"], rtol=1e-4, err_msg=f"losses differ: {first}")
    seconds = {name: np.zeros((2, repeats)) for name in steps}
    for repeat in range(repeats):
        for name in list(steps)[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter(), time.process_time()
            steps[name]()
            seconds[name][:, repeat] = time.perf_counter() - start[0], time.process_time() - start[1]
    return seconds


def main(config: Config) -> None:
    """Times every version and prints the table."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((config.batch, config.length, 1)), jnp.float32)
    batch = (x, jnp.asarray(random.integers(0, CLASSES, config.batch), jnp.int32))
    params = make_model(config).init(jax.random.key(0), x)["params"]
    steps: dict[str, Any] = {
        "by hand": by_hand(config, params, batch),
        "library": by_library(config, params, batch, scan_layers=True),
        "library, unrolled": by_library(config, params, batch, scan_layers=False),
    }
    if importlib.util.find_spec("torch"):
        steps["PyTorch"] = by_torch(config, params, batch)
    seconds = time_in_turn(steps, config.repeats)
    table = Table(
        title=f"Training step on CPU ({cores()} cores, {platform.machine()}), float32, {config.layers} layers, "
        f"{config.features} features, B = {config.batch}, L = {config.length}, jax {jax.__version__}",
        caption=f"Ratios to by hand, medians of {config.repeats} rounds: of time, and of time on the CPU",
    )
    for column in ("", "compile", "step", "ratio", "CPU ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, taken in seconds.items():
        compiled = f"{steps[name].compile_seconds:.1f} s" if isinstance(steps[name], Run) else ""
        ratio, cpu_ratio = np.median(taken / seconds["by hand"], axis=-1)
        table.add_row(name, compiled, f"{1e3 * np.median(taken[0]):.0f} ms", f"{ratio:.3f}", f"{cpu_ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
