"""What a task gives to the training loop: a `Recipe`, which is options, and the `Task` that it builds.

A recipe is a frozen dataclass with a default for every field and a docstring below each, which `--help` shows. Making
one does no work; `build` reads the data. The recipe's own docstring states the command, the hardware, the time and the
score to expect.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import flashbutterfly_jax as fb
from experiments.common.sharding import StateSharding

SMOKE_SCHEDULE: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 1,
        "decay_steps": None,
        "log_every": 2,
        "evaluate_every": 3,
        "checkpoint_every": 2,
    }
)
"""Options of every preset `smoke`: too few steps to learn from, and enough to be stopped in, evaluated and saved."""

type Batch = Any
"""A tree of arrays, most often a dictionary, whose leading axes are the examples of the batch."""


class Measure(NamedTuple):
    """A quantity of each example of a batch. Its mean over any examples is the sum of totals over that of weights."""

    total: jax.Array
    """(B,)."""

    weight: jax.Array
    """(B,): ones, or for example the number of tokens over which the total of a text was summed."""


def classify(model: nn.Module, batch: Batch, deterministic: bool) -> jax.Array:
    """The logits (B, num_classes) of a batch with `inputs` and, where sequences are padded, `lengths`."""
    return model(batch["inputs"], lengths=batch.get("lengths"), deterministic=deterministic)


def classification(logits: jax.Array, batch: Batch) -> dict[str, Measure]:
    """Cross-entropy in nats and accuracy, by the integers in `labels`."""
    labels = batch["labels"]
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    ones = jnp.ones_like(loss)
    return {"loss": Measure(loss, ones), "accuracy": Measure((logits.argmax(-1) == labels).astype(loss.dtype), ones)}


@dataclass(frozen=True)
class Task:
    """A model, its data, and how well it does."""

    model: nn.Module
    """With the collection `params`, and `batch_stats` if it normalises by batches."""

    train: grain.MapDataset
    """The training examples, trees of numpy arrays of fixed shapes. Its length is an epoch; example i beyond it belongs
    to epoch `i // len(train)`, so that i alone, with the seed, says what it is. Grain's own operations are like that:
    `grain.MapDataset.source(rows).seed(seed).shuffle()`, and `.random_map(augment)` after it."""

    evaluation: Mapping[str, grain.MapDataset]
    """The splits to evaluate, by name, in the same shapes. If there are `validation` and `test`, then the result is the
    test score where the validation score was best."""

    forward: Callable[[nn.Module, Batch, bool], Any] = classify
    """What the model makes of a batch, given the model, the batch and whether to be deterministic."""

    measure: Callable[[Any, Batch], dict[str, Measure]] = classification
    """Of that result and the batch. The mean of `loss` is what training makes small."""

    score: str = "accuracy"
    """The measure that is the task's score; higher is better, unless it is the loss."""

    initial: Mapping[str, Any] = field(default_factory=dict)
    """Parameters to start from, by their first names in the tree of the model's; the others are initialised."""

    tokens_per_example: int | None = None
    """Where an example is that many tokens, the log has tokens per second."""

    flop_per_example: float | None = None
    """That the model needs for the forward and the backward pass, recomputation left out: for the log."""


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """The options that every task has. A task adds its own, changes the defaults, and builds what they describe."""

    seed: int = 0
    """Fixes the initialisation, the data's order and augmentation, and the dropout."""

    steps: int = 1000
    """Of the optimiser, in all."""

    batch_size: int = 32
    """Examples in a step, over all devices."""

    learning_rate: float = 0.01
    """Peak learning rate of everything but the long kernels."""

    kernel_learning_rate: float | None = None
    """Peak learning rate of the long kernels; None is that of the rest."""

    weight_decay: float = 0.05
    """AdamW's decay of everything but the long kernels, which have none."""

    warmup_steps: int = 0
    """Of linear warm-up."""

    decay_steps: int | None = None
    """At which the half cosine, counted from step 0, reaches its end; None is after all steps."""

    final_fraction: float = 0.0
    """Of the peak learning rates, at which the half cosine ends."""

    clip_norm: float | None = None
    """Longer gradients, all parameters as one vector, are scaled down to this length; None leaves them."""

    accumulation: int = 1
    """Parts of a batch that are computed one after the other, for the memory; the gradient is that of all."""

    state_sharding: StateSharding = "replicated"
    """`sharded` divides parameters and optimizer state over all devices, and gathers parameters for each step."""

    log_every: int = 10
    """Steps over which each line of training metrics is a mean."""

    evaluate_every: int = 100
    """Steps between evaluations; there is one after the last step, too."""

    checkpoint_every: int = 100
    """Steps between checkpoints, a multiple of log_every; there is one after the last step, too."""

    implementation: Literal["xla", "butterfly", "mosaic_gpu"] | None = None
    """Of the long convolutions; None picks the fastest that the device and the dtype allow."""

    @abstractmethod
    def build(self) -> Task:
        """What the recipe describes."""

    def __post_init__(self) -> None:
        self.require("seed", 0 <= self.seed < 2**32, "from 0 to 2**32 - 1")
        for name in ("steps", "batch_size", "accumulation", "log_every", "evaluate_every", "checkpoint_every"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "kernel_learning_rate", "weight_decay"):
            rate = getattr(self, name)
            self.require(name, rate is None or 0 <= rate < math.inf, "at least 0 and finite")
        self.require("clip_norm", self.clip_norm is None or 0 < self.clip_norm < math.inf, "above 0 and finite")
        whole = self.batch_size % self.accumulation == 0
        self.require("accumulation", whole, f"a divisor of batch_size = {self.batch_size}")
        # Means over log_every steps start at a checkpoint again, so that no line depends on where a run was killed.
        whole = self.checkpoint_every % self.log_every == 0
        self.require("checkpoint_every", whole, f"a multiple of log_every = {self.log_every}")
        self.require("final_fraction", 0 <= self.final_fraction <= 1, "from 0 to 1")
        self.require("decay_steps", self.decay_steps is None or self.decay_steps >= 1, "at least 1")
        end = self.schedule_steps
        self.require("warmup_steps", 0 <= self.warmup_steps < end, f"from 0 to below the {end} steps of the schedule")

    def require(self, name: str, fulfilled: bool, expected: str) -> None:
        """Raises the ValueError of an option that is not as expected."""
        if not fulfilled:
            raise ValueError(f"{name} must be {expected}; got {getattr(self, name)}.")

    @property
    def whereabouts(self) -> tuple[str, ...]:
        """Options that say where something is, or how fast to make it, and not what: a run may go on with others."""
        return ("state_sharding",)

    @property
    def schedule_steps(self) -> int:
        """After which the learning rates stay as they are."""
        return self.steps if self.decay_steps is None else self.decay_steps

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, under which the long kernels have a learning rate of their own and no decay, after clipping."""
        adamw = fb.optim.adamw(
            self.learning_rate,
            kernel_learning_rate=self.kernel_learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            total_steps=self.schedule_steps,
            final_fraction=self.final_fraction,
            label=self.label,
        )
        return adamw if self.clip_norm is None else optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)

    def label(self, params: Any) -> Any:
        """Which parameters train as long kernels, as a tree of labels."""
        return fb.optim.label_long_kernels(params)

    def learning_rates(self, step: jax.Array) -> dict[str, jax.Array]:
        """What the optimizer makes the update number `step` with, counted from 0: for the logs."""
        factor = fb.optim.warmup_cosine(self.warmup_steps, self.schedule_steps, self.final_fraction)(step)
        kernel_peak = self.learning_rate if self.kernel_learning_rate is None else self.kernel_learning_rate
        return {"learning_rate": factor * self.learning_rate, "kernel_learning_rate": factor * kernel_peak}
