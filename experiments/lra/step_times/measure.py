"""A training step of a case, compiled and timed."""

import gc
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.initialization import quickly_compiled_random_bits
from experiments.common.memory import step_bytes
from experiments.lra.step_times.cases import Case
from pallas_kernels.timing import Effort, seconds_per_call

type Status = Literal["measured", "unsupported", "failed"]


@dataclass(frozen=True)
class Variant:
    """With what a step is computed."""

    architecture: Literal["long_conv", "transformer"]
    implementation: str
    """Of the long convolutions, or of the attention."""
    dtype: Literal["float32", "bfloat16"]

    @property
    def label(self) -> str:
        return f"{self.architecture}, {self.implementation}, {self.dtype}"

    def of(self, case: Case) -> Case:
        """The case computed so."""
        which = "implementation" if self.architecture == "long_conv" else "attention"
        return case.with_options(architecture=self.architecture, dtype=self.dtype, **{which: self.implementation})


VARIANTS = (
    Variant("long_conv", "xla", "float32"),
    Variant("long_conv", "mosaic_gpu", "float32"),
    Variant("long_conv", "xla", "bfloat16"),
    Variant("long_conv", "mosaic_gpu", "bfloat16"),
    Variant("transformer", "xla", "float32"),
    Variant("transformer", "xla", "bfloat16"),
    Variant("transformer", "cudnn", "bfloat16"),
)
LONGEST_MATRIX = 4096  # of weights of attention that "xla" makes: 64 sequences of 16,384 would need terabytes


@dataclass(frozen=True)
class Row:
    """A step of one task and variant."""

    task: str
    architecture: str
    implementation: str
    dtype: str
    status: Status
    batch: int
    length: int
    reason: str | None = None
    ms: float | None = None
    ms_quartiles: tuple[float, float] | None = None
    examples_per_second: float | None = None
    epoch_hours: float | None = None
    """Estimated: an epoch's steps, one after the other."""
    step_bytes: int | None = None
    """The compiler's plan."""
    parameters: int | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.task, self.architecture, self.implementation, self.dtype

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(task: str, case: Case, variant: Variant, effort: Effort) -> Row:
    """Times a step; what a variant cannot do, or has no memory for, is the reason that its row gives."""
    about = {"task": task, **asdict(variant), "batch": case.recipe.batch_size, "length": case.length}
    if variant.architecture == "transformer" and variant.implementation == "xla" and case.length > LONGEST_MATRIX:
        reason = f"not tried: matrices of {case.length:,} × {case.length:,} weights for each head and sequence"
        return Row(**about, status="unsupported", reason=reason)
    try:
        return Row(**about, **timed(variant.of(case), effort))
    except (NotImplementedError, ValueError) as error:
        return Row(**about, status="unsupported", reason=first_sentence(error))
    except (RuntimeError, MemoryError) as error:  # of JAX: no memory, or a compiler that gives up
        return Row(**about, status="failed", reason=first_sentence(error))
    finally:
        gc.collect()  # the arrays of a step that failed


def timed(case: Case, effort: Effort) -> dict[str, Any]:
    """Initialises, compiles, and times steps that follow one another, each from the state that the last one left."""
    model, recipe, batch = case.model(), case.recipe, case.batch()
    optimizer = recipe.optimizer()

    def apply(variables: Any, batch: Any, **options: Any) -> Any:
        return model.apply(variables, batch["inputs"], **lengths_of(batch), deterministic=False, **options)

    def initialize() -> tuple[Any, ...]:
        example = {name: array[:1] for name, array in batch.items()}
        options = lengths_of(example)
        variables = dict(model.init(jax.random.key(0), example["inputs"], **options, deterministic=True))
        params = variables.pop("params")
        return params, variables, optimizer.init(params), jnp.int32(0)

    def step(state: tuple[Any, ...], batch: Any) -> tuple[Any, ...]:
        params, statistics, optimizer_state, number = state
        rngs = {"dropout": jax.random.fold_in(jax.random.key(1), number)}

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, **statistics}
            logits, updated = apply(variables, batch, rngs=rngs, mutable=list(statistics))
            logits = logits.astype(jnp.float32)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean(), updated

        gradient, updated = jax.grad(loss_of, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), dict(updated), optimizer_state, number + 1

    with quickly_compiled_random_bits():
        state = jax.jit(initialize)()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state[0]))

    def run(steps: int) -> float:
        nonlocal state
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(steps):
            state = compiled(state, batch)
        jax.block_until_ready(state)
        return time.perf_counter() - start

    seconds = seconds_per_call(run, effort)
    median, (low, high) = float(np.median(seconds)), np.quantile(seconds, (0.25, 0.75))
    if not np.isfinite(float(jax.tree.leaves(state[0])[0].ravel()[0])):
        raise RuntimeError("the parameters are not finite after the timed steps")
    return {
        "status": "measured",
        "ms": median * 1e3,
        "ms_quartiles": (low * 1e3, high * 1e3),
        "examples_per_second": recipe.batch_size / median,
        "epoch_hours": case.examples // recipe.batch_size * median / 3600,
        "step_bytes": step_bytes(compiled),
        "parameters": parameters,
    }


def lengths_of(batch: Any) -> dict[str, Any]:
    """The argument that padded sequences need, and images do not have."""
    return {name: array for name, array in batch.items() if name == "lengths"}


def first_sentence(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
