"""Language models without their parameters: sizes, the cache of a generation, and the checks of both."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from flashbutterfly_jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Size:
    """A published size of the H3 models, with the recipe that goes with it."""

    features: int
    num_layers: int
    num_heads: int
    attention_layers: tuple[int, ...]
    """Counted from 0; all others have the mixer."""
    learning_rate: float
    """Peak."""
    batch_size: int
    """Sequences of 2,048 tokens in a step."""
    init_scale: float = 0.02

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `flashbutterfly_jax.linen.LanguageModel`."""
        names = ("features", "num_layers", "num_heads", "attention_layers", "init_scale")
        return {name: getattr(self, name) for name in names}


# HazyResearch/safari, configs/experiment/pile. The configuration of long convolutions is there for 125M alone.
SIZES: dict[str, Size] = {
    "125M": Size(768, 12, 12, (1, 8), 6e-4, 256),
    "355M": Size(1024, 24, 16, (1, 13), 3e-4, 256),
    "1.3B": Size(2048, 24, 16, (1, 13), 2e-4, 512),
    "2.7B": Size(2560, 32, 20, (10, 21), 1.6e-4, 512, init_scale=(2 / (5 * 2560)) ** 0.5),
}


class Cache(struct.PyTreeNode):
    """What a language model remembers of the tokens until now: a pytree, whatever its layers are."""

    layers: tuple[Any, ...]
    position: Any
    """int32 (): tokens until now."""

    batch_size: int = struct.field(pytree_node=False)
    max_length: int = struct.field(pytree_node=False)
    """Tokens that fit."""


def check_cache(cache: Any, expected: Any) -> None:
    """Refuses a cache that `init_cache` of this model does not make.

    Raises:
      ValueError: naming what differs first.
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"cache must be what init_cache of this model gives; got {type(cache).__name__}.")
    given, wanted = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (cache, expected))
    for (path, leaf), (other_path, other) in zip(given, wanted, strict=False):
        place, other_place = jax.tree_util.keystr(path), jax.tree_util.keystr(other_path)
        if (place, leaf.shape, leaf.dtype) != (other_place, other.shape, other.dtype):
            raise ValueError(
                f"cache is one of another model: it has {place} of shape {leaf.shape} and {leaf.dtype}, where this "
                f"model has {other_place} of shape {other.shape} and {other.dtype}."
            )
    if len(given) != len(wanted):
        raise ValueError(
            f"cache is one of another model: it has {len(given)} arrays, where this one has {len(wanted)}."
        )


def as_tokens(tokens: ArrayLike, vocab_size: int) -> Int[Array, "B L"]:
    """The tokens as an array.

    Raises:
      ValueError: unless they are integers of shape (B, L), and those whose values are known here in the vocabulary.
    """
    array = tokens if isinstance(tokens, jax.Array) else jnp.asarray(np.asarray(tokens))
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.ndim != 2:
        raise ValueError(f"tokens must be integers of shape (B, L); got {array.dtype} of shape {array.shape}.")
    if isinstance(tokens, np.ndarray | list | tuple):
        check_tokens(np.asarray(tokens), vocab_size)
    return array


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Refuses tokens out of the vocabulary.

    Raises:
      ValueError: naming the first.
    """
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if wrong.any():
        raise ValueError(
            f"tokens must be from 0 to {vocab_size - 1}, those of the vocabulary; got {tokens[wrong].flat[0]} at index "
            f"{tuple(int(index) for index in np.argwhere(wrong)[0])}."
        )
