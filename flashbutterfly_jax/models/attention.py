"""Causal attention without its parameters: over a sequence, and over what a cache remembers."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

type AttentionImplementation = Literal["xla", "cudnn"] | None


class KeyValueCache(NamedTuple):
    """What attention remembers of the steps until now."""

    keys: Float[Array, "*B M heads head"]
    values: Float[Array, "*B M heads head"]
    position: Int[Array, ""]
    """Steps until now."""


def rotate(x: Float[Array, "*B L heads head"], positions: Int[Array, "L"]) -> Float[Array, "*B L heads head"]:
    r"""Rotary positions (Su et al. 2021): features i and i + head / 2 are turned by the angle
    :math:`t \cdot 10000^{-2i/\mathrm{head}}` at position t, so that products of queries and keys know their distance.

    Angles are in float32; the result has the dtype of x.
    """
    half = x.shape[-1] // 2
    rates = jnp.exp(-math.log(10_000) * jnp.arange(half) / half)
    angles = (positions[:, None] * rates)[:, None]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    turned = (
        first * jnp.cos(angles) - second * jnp.sin(angles),
        second * jnp.cos(angles) + first * jnp.sin(angles),
    )
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def causal_attention(
    query: Float[Array, "B L heads head"],
    key: Float[Array, "B L heads head"],
    value: Float[Array, "B L heads head"],
    *,
    dropout_rate: float = 0.0,
    next_key: Callable[[], PRNGKeyArray] | None = None,
    implementation: AttentionImplementation = None,
) -> Float[Array, "B L heads head"]:
    r"""Softmax of :math:`q \cdot k / \sqrt{\mathrm{head}}` over the steps until each one, times the values.

    Args:
      query: in the dtype of the result. The softmax is in float32.
      key: likewise.
      value: likewise.
      dropout_rate: of the weights, where ``next_key`` is given.
      next_key: makes the random key of the dropout; None leaves it out.
      implementation: of `jax.nn.dot_product_attention`, which there is no dropout in: ``"cudnn"`` is flash attention.

    Raises:
      NotImplementedError: for dropout under ``"cudnn"``.
    """
    if dropout_rate == 0 or next_key is None:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=implementation)
    if implementation == "cudnn":
        raise NotImplementedError('implementation "cudnn" has no dropout of attention weights: set its rate to 0.')
    length = query.shape[1]
    weights = _weights(query, key, jnp.tril(jnp.ones((length, length), bool)))
    keep = jax.random.bernoulli(next_key(), 1 - dropout_rate, weights.shape)
    weights = jnp.where(keep, weights / (1 - dropout_rate), 0).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def remember(cache: KeyValueCache, key: Array, value: Array) -> KeyValueCache:
    """The cache with the keys and values of the steps that follow, (*B, L, heads, head)."""
    start = (0, cache.position, 0, 0)
    return KeyValueCache(
        jax.lax.dynamic_update_slice(cache.keys, key.astype(cache.keys.dtype), start),
        jax.lax.dynamic_update_slice(cache.values, value.astype(cache.values.dtype), start),
        cache.position + key.shape[1],
    )


def attend(query: Float[Array, "B 1 heads head"], cache: KeyValueCache) -> Float[Array, "B 1 heads head"]:
    """Attention of the latest step to all that the cache remembers."""
    known = jnp.arange(cache.keys.shape[1]) < cache.position
    weights = _weights(query, cache.keys, known).astype(query.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, cache.values)


def _weights(query: Array, key: Array, allowed: Array) -> Array:
    products = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=_wide(query)) / math.sqrt(key.shape[-1])
    return jax.nn.softmax(jnp.where(allowed, products, -jnp.inf), axis=-1)


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
