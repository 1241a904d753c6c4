"""Causal attention as a Linen module."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flashbutterfly_jax.models.attention import (
    AttentionImplementation,
    KeyValueCache,
    attend,
    causal_attention,
    remember,
    rotate,
)
from flashbutterfly_jax.models.checks import check_choice, check_positive, check_rate
from flashbutterfly_jax.typing import DTypeLike, Precision


class CausalAttention(nn.Module):
    r"""Multi-head attention of each step to the steps until it.

    .. math:: y_t = W \sum_{s \le t} \mathrm{softmax}_s\Big(\frac{q_t \cdot k_s}{\sqrt{\mathrm{head}}}\Big) v_s

    Without ``rotary`` it knows the order of steps by the mask alone, as in the hybrid models of H3, whose other layers
    tell positions apart. Parameters: ``query``, ``key``, ``value`` and ``output``, dense layers (D, D) with biases.

    Attributes:
      features: D.
      num_heads: of D / num_heads features each.
      rotary: turns queries and keys by their positions.
      dropout_rate: of the weights, in training.
      dense_init: initialises the weights of the three projections.
      output_init: initialises that of the output.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the dense layers.
      implementation: of `jax.nn.dot_product_attention`: ``"xla"``, ``"cudnn"`` (flash attention, 16 bits), or None.

    Raises:
      ValueError: at construction for a wrong argument.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> layer = fb.linen.CausalAttention(features=8, num_heads=2)
      >>> x = jnp.ones((2, 16, 8))
      >>> layer.apply(jax.jit(layer.init)(jax.random.key(0), x), x).shape
      (2, 16, 8)
    """

    features: int
    num_heads: int
    rotary: bool = False
    dropout_rate: float = 0.0
    dense_init: Callable = nn.initializers.normal(0.02)
    output_init: Callable = nn.initializers.normal(0.02)
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None
    implementation: AttentionImplementation = None

    def __post_init__(self):
        check_positive("features", self.features)
        check_positive("num_heads", self.num_heads)
        if self.features % self.num_heads:
            raise ValueError(f"num_heads must divide features = {self.features}; got {self.num_heads}.")
        if self.rotary and self.features // self.num_heads % 2:
            raise ValueError(
                f"rotary needs an even number of features for each head; got {self.features} features and "
                f"num_heads = {self.num_heads}."
            )
        check_rate("dropout_rate", self.dropout_rate)
        if self.implementation is not None:
            check_choice("implementation", self.implementation, ("xla", "cudnn"))
        super().__post_init__()

    def setup(self):
        dense = functools.partial(
            nn.Dense, self.features, dtype=self.dtype, param_dtype=self.param_dtype, precision=self.precision
        )
        self.query, self.key, self.value = (dense(kernel_init=self.dense_init) for _ in range(3))
        self.output = dense(kernel_init=self.output_init)

    def __call__(self, x: Float[Array, "B L D"], *, deterministic: bool = True) -> Float[Array, "B L D"]:
        """The output at every step."""
        query, key, value = self._project(x, jnp.arange(x.shape[1]))
        next_key = None if deterministic else functools.partial(self.make_rng, "dropout")
        mixed = causal_attention(
            query,
            key,
            value,
            dropout_rate=self.dropout_rate,
            next_key=next_key,
            implementation=self.implementation,
        )
        return self.output(mixed.reshape(x.shape))

    def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> KeyValueCache:
        """An empty cache for sequences of up to ``max_length`` steps."""
        shape = (batch_size, max_length, self.num_heads, self.features // self.num_heads)
        return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))

    def prefill(self, x: Float[Array, "B L D"], cache: KeyValueCache) -> tuple[Float[Array, "B L D"], KeyValueCache]:
        """The output at the first steps, and the cache that remembers them."""
        query, key, value = self._project(x, jnp.arange(x.shape[1]))
        mixed = causal_attention(query, key, value, implementation=self.implementation)
        return self.output(mixed.reshape(x.shape)), remember(cache, key, value)

    def step(self, x: Float[Array, "B D"], cache: KeyValueCache) -> tuple[Float[Array, "B D"], KeyValueCache]:
        """The output at the next step, and the cache that remembers it."""
        query, key, value = self._project(x[:, None], cache.position[None])
        cache = remember(cache, key, value)
        return self.output(attend(query, cache).reshape(x.shape)), cache

    def _project(self, x, positions):
        query, key, value = (
            projection(x).reshape(*x.shape[:-1], self.num_heads, -1)
            for projection in (self.query, self.key, self.value)
        )
        if self.rotary:
            query, key = rotate(query, positions), rotate(key, positions)
        return query, key, value
