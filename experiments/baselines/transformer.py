"""A Transformer layer, on `jax.nn.dot_product_attention`."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from experiments.baselines.output import check_common, dense
from flashbutterfly_jax.models.checks import (
    as_lengths,
    as_sequence,
    check_choice,
    check_positive,
    resolve_deterministic,
)
from flashbutterfly_jax.models.layer import mask_padding
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Precision


class Transformer(nn.Module):
    r"""Attention beside a feed-forward network, in the place of `flashbutterfly_jax.linen.LongConv`.

    .. math:: y = \operatorname{Attention}(x) + W_2 \operatorname{GELU}(W_1 x)

    With the residual connection and the norm of a prenorm block that is the parallel Transformer layer (Wang and
    Komatsuzaki's GPT-J; PaLM, arXiv 2204.02311, section 2): one block, as every other layer here is one block.
    Positions come in by rotating queries and keys (RoPE, arXiv 2104.09864), since `SequenceClassifier` encodes none.
    Padding is no key. There is no dropout of attention weights, which flash attention does not offer in JAX.

    Parameters: ``query``, ``key``, ``value``, ``attention_output`` (D, D); ``up`` (D, 4D), ``down`` (4D, D); biases.

    Attributes:
      features: D.
      kernel_length: not used: attention has no longest sequence. There for models that give it to their layers.
      bidirectional: attends to later positions, too.
      num_heads: of which each has D / num_heads features, an even number.
      expansion: hidden features of the feed-forward network, in units of D.
      dropout_rate: of the hidden features.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the dense layers.
      deterministic: True leaves dropout out. May be given at the call instead.
      implementation: of `jax.nn.dot_product_attention`: ``"cudnn"`` is flash attention, on NVIDIA GPUs in 16 bits;
        ``"xla"`` and None make the matrix of L x L weights.

    Raises:
      ValueError: at construction for a wrong argument, at the call for a wrong x or lengths.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = Transformer(features=8, kernel_length=64, num_heads=2)
      >>> x = jnp.ones((2, 64, 8))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 64, 8)
    """

    features: int
    kernel_length: int
    bidirectional: bool = False
    num_heads: int = 4
    expansion: int = 4
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None
    deterministic: bool | None = None
    implementation: Literal["xla", "cudnn"] | None = None

    def __post_init__(self):
        check_common(self)
        check_positive("num_heads", self.num_heads)
        check_positive("expansion", self.expansion)
        if self.implementation is not None:
            check_choice("implementation", self.implementation, ("xla", "cudnn"))
        if self.features % (2 * self.num_heads):
            raise ValueError(
                f"features must be a multiple of 2 * num_heads = {2 * self.num_heads}, for rotated pairs; "
                f"got {self.features}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Annotated[ArrayLike, "*B L D"],
        *,
        lengths: Annotated[ArrayLike, "*B"] | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*B L D"]:
        deterministic = resolve_deterministic(deterministic, self.deterministic, matters=self.dropout_rate > 0)
        x = mask_padding(as_sequence(x, self.features), lengths)
        x = x.astype(self.dtype or jnp.result_type(x, self.param_dtype))
        hidden = jax.nn.gelu(dense(self, self.features, self.expansion * self.features, "up")(x), approximate=False)
        hidden = nn.Dropout(self.dropout_rate)(hidden, deterministic=deterministic)
        return self._attention(x, lengths) + dense(self, self.expansion * self.features, self.features, "down")(hidden)

    def _attention(self, x, lengths):
        *batch, length, _ = x.shape
        query, key, value = (
            dense(self, self.features, self.features, name)(x).reshape(-1, length, self.num_heads, self._head_features)
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(
            rotate(query),
            rotate(key),
            value,
            is_causal=not self.bidirectional,
            key_value_seq_lengths=None if lengths is None else _at_least_one(as_lengths(lengths, tuple(batch))),
            implementation=self.implementation,
        )
        output = dense(self, self.features, self.features, "attention_output")
        return output(attended.reshape(*batch, length, self.features))

    @property
    def _head_features(self) -> int:
        return self.features // self.num_heads


def rotate(x: Float[Array, "B L H F"]) -> Float[Array, "B L H F"]:
    r"""Rotates features i and i + F/2 at position t by the angle :math:`t \cdot 10000^{-2i/F}`, in float32.

    The product of a rotated query and a rotated key depends on their positions by the difference alone.

    Example:
      >>> import jax.numpy as jnp
      >>> rotated = rotate(jnp.array([1.0, 0.0, 1.0, 0.0]).reshape(1, 2, 1, 2))
      >>> [round(value, 2) for value in rotated.ravel().tolist()]  # the second by one radian
      [1.0, 0.0, 0.54, 0.84]
    """
    length, half = x.shape[1], x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rates = 10000.0 ** (-jnp.arange(half, dtype=wide) / half)
    angles = jnp.arange(length, dtype=wide)[:, None, None] * rates
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def _at_least_one(lengths: Int[Array, "*B"]) -> Int[Array, " B"]:
    """A softmax over no key is not defined; the first position of an empty sequence is zero."""
    return jnp.maximum(lengths, 1).astype(jnp.int32).reshape(-1)
