"""The exact perplexity of a text: every token but the first counts once, with as much before it as asked for."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.language.tokens import sliding_windows


class Perplexity(NamedTuple):
    """Of some tokens."""

    nats: float
    """The sum of their negative log-likelihoods."""
    tokens: int

    @property
    def value(self) -> float:
        """Exp of the mean."""
        return math.exp(self.nats / self.tokens)

    def bits_per_byte(self, byte_count: float) -> float:
        """Where the tokens are of a text of so many bytes; their separators are paid for and are no bytes of it."""
        return self.nats / math.log(2) / byte_count


def perplexity(
    model: Any,
    variables: Any,
    tokens: np.ndarray,
    *,
    length: int,
    stride: int | None = None,
    batch_size: int = 16,
    at_most: int | None = None,
    track: Callable[[list], Iterable] = iter,
) -> Perplexity:
    """That of a language model on one array of tokens.

    Windows of `length` tokens begin every `stride` tokens. A window's last tokens that no window before it had are
    counted, so that each token is, with at least `length - stride` tokens before it if there are so many. A stride of
    `length` is what training sees; smaller ones cost more and are nearer to what the model can do.

    Args:
      model: called with tokens (B, L) and `deterministic=True`; the logits of what follows each.
      variables: of it.
      tokens: at least 2.
      length: of the windows.
      stride: from 1 to length; None is length.
      batch_size: windows at once.
      at_most: tokens of the beginning that are measured; None is all.
      track: wraps the list of batches, for a progress bar.

    Raises:
      ValueError: if an argument is out of range.
    """
    stride = length if stride is None else stride
    tokens = tokens[:at_most]
    if len(tokens) < 2:
        raise ValueError(f"tokens must be at least 2, one to predict from the other; got {len(tokens)}.")
    for name, value, most in (("length", length, None), ("stride", stride, length)):
        if value < 1 or (most is not None and value > most):
            raise ValueError(f"{name} must be from 1{f' to {most}' if most else ''}; got {value}.")
    windows = list(sliding_windows(len(tokens), length, stride))
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    nats, step = 0.0, functools.partial(_nats, model)
    for batch in track(batches):
        rows, counted = np.zeros((batch_size, length + 1), np.int32), np.zeros((batch_size, length), bool)
        for row, (start, new) in enumerate(batch):
            window = tokens[start : start + length + 1]
            rows[row, : len(window)] = window
            counted[row, len(window) - 1 - new : len(window) - 1] = True
        nats += float(np.asarray(step(variables, rows, counted), np.float64).sum())
    return Perplexity(nats, len(tokens) - 1)


@functools.partial(jax.jit, static_argnums=0)
def _nats(model: Any, variables: Any, rows: jax.Array, counted: jax.Array) -> jax.Array:
    """The sums of negative log-likelihoods of each row's counted labels; causal models do not see the padding."""
    logits = model.apply(variables, rows[:, :-1], deterministic=True).astype(jnp.float32)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    return jnp.where(counted, losses, 0).sum(-1)
