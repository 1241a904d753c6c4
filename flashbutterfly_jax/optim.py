"""The optimiser of the paper's recipes: AdamW whose long kernels have a learning rate of their own and no decay."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from flashbutterfly_jax.models.checks import check_positive

type Label = Literal["long_kernel", "other"]

_OF_KERNELS = ("kernel", "log_decay", "frequency", "log_step", "input")


def adamw(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    kernel_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    final_fraction: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    label: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    r"""AdamW in two groups, each with its own peak learning rate under one schedule.

    Long kernels (`label_long_kernels`) have ``kernel_learning_rate`` and no weight decay; every other parameter has
    ``learning_rate`` and ``weight_decay``, biases, norms and skips included, as in the paper's code. With m and v
    Adam's bias-corrected moments and f the `warmup_cosine` of the step,

    .. math:: p \leftarrow p - f\,\eta\, \Big(\frac{m}{\sqrt v + \epsilon} + w\, p\Big)

    State and updates have the dtypes of the parameters.

    Args:
      learning_rate: peak of the other parameters.
      total_steps: at which the rates reach their end.
      warmup_steps: at which the rates peak.
      kernel_learning_rate: peak of the long kernels; None is ``learning_rate``, and 0 freezes them.
      weight_decay: w, of the other parameters.
      final_fraction: of the peaks, at which the rates end.
      b1: of the first moment.
      b2: of the second moment.
      eps: added to the root.
      label: says of a tree of parameters which are long kernels, as a tree of labels; None is `label_long_kernels`.

    Raises:
      ValueError: if a rate, the decay or a number of steps is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flashbutterfly_jax as fb
      >>> layer = fb.linen.LongConv(features=4, kernel_length=16)
      >>> params = layer.init(jax.random.key(0), jnp.ones((16, 4)))["params"]
      >>> optimizer = fb.optim.adamw(0.01, kernel_learning_rate=0.0, total_steps=100)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> float(abs(updates["kernel"]).max()), round(float(updates["skip"][0, 0]), 6)
      (0.0, -0.01)
    """
    check_positive("total_steps", total_steps)
    kernel_learning_rate = learning_rate if kernel_learning_rate is None else kernel_learning_rate
    rates = {
        "learning_rate": learning_rate,
        "kernel_learning_rate": kernel_learning_rate,
        "weight_decay": weight_decay,
    }
    for name, value in rates.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0; got {value}.")
    schedule = warmup_cosine(warmup_steps, total_steps, final_fraction)

    def group(peak: float, decay: float) -> optax.GradientTransformation:
        if peak == 0:
            return optax.set_to_zero()
        return optax.adamw(lambda step: peak * schedule(step), b1=b1, b2=b2, eps=eps, weight_decay=decay)

    groups = {"long_kernel": group(kernel_learning_rate, 0.0), "other": group(learning_rate, weight_decay)}
    return optax.partition(groups, label_long_kernels if label is None else label)


def warmup_cosine(warmup_steps: int, total_steps: int, final_fraction: float = 0.0) -> optax.Schedule:
    r"""From 0 linearly to 1, then half a cosine down to the final fraction r, where it stays.

    .. math:: f(t) = t / w \;\;(t < w), \qquad
        f(t) = r + \frac{1 - r}{2} \Big(1 + \cos \pi \frac{t - w}{T - w}\Big)

    Steps count from 0, so the first step of a warm-up moves nothing, as in the paper's code.

    Args:
      warmup_steps: w, at least 0.
      total_steps: T, more than w.
      final_fraction: r, from 0 to 1.

    Raises:
      ValueError: unless 0 <= warmup_steps < total_steps and 0 <= final_fraction <= 1.

    Example:
      >>> [round(float(warmup_cosine(2, 6)(step)), 3) for step in (0, 1, 2, 4, 6, 9)]
      [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be in [0, total_steps = {total_steps}); got {warmup_steps}.")
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction must be in [0, 1]; got {final_fraction}.")

    def factor(step: Array | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0, 1)
        cosine = final_fraction + (1 - final_fraction) * (1 + jnp.cos(jnp.pi * progress)) / 2
        return jnp.where(step < warmup_steps, step / max(warmup_steps, 1), cosine)

    return factor


def label_long_kernels(params: PyTree) -> PyTree[Label]:
    """Labels each parameter ``"long_kernel"`` or ``"other"``.

    A long kernel is called ``kernel`` and has a sibling ``skip``: the kernel of a dense layer has none. So do the
    transitions and inputs of the state-space models from which H3 makes its kernels, and they count as such. So do
    the learned blocks of butterflies, to which the authors' code gives a rate of their own and no decay.

    Args:
      params: of Linen, or an NNX state.

    Example:
      >>> label_long_kernels({"layer": {"kernel": 0, "skip": 0, "output": {"kernel": 0, "bias": 0}}})
      {'layer': {'kernel': 'long_kernel', 'output': {'bias': 'other', 'kernel': 'other'}, 'skip': 'other'}}
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [_names(path) for path, _ in leaves]
    skips = {path[:-1] for path in paths if path[-1:] == ("skip",)}
    labels = ["long_kernel" if _is_long_kernel(path, skips) else "other" for path in paths]
    return jax.tree.unflatten(structure, labels)


def _is_long_kernel(path: tuple[str, ...], skips: set[tuple[str, ...]]) -> bool:
    """By its name and its siblings; and by that of its tree, if it is a learned block of a butterfly."""
    return "butterfly_blocks" in path or bool(path and path[-1] in _OF_KERNELS and path[:-1] in skips)


def _names(path: tuple) -> tuple[str, ...]:
    """The names along a path, without the attribute in which an NNX variable holds its array."""
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    return names[:-1] if names[-1:] == ("value",) else names
