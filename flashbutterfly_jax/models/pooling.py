"""From a sequence of features to one vector for its class."""

from typing import Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from flashbutterfly_jax.models.checks import as_lengths
from flashbutterfly_jax.typing import ArrayLike

type Pooling = Literal["mean", "last"]


def pool(
    x: Float[Array, "*B L D"], how: Pooling, lengths: Annotated[ArrayLike, "*B"] | None = None
) -> Float[Array, "*B D"]:
    """The mean over the length, or the last position. A sequence of length 0 has mean 0, and its first position last.

    Args:
      x: the sequence.
      how: ``"mean"`` or ``"last"``.
      lengths: of each sequence without its padding; above L they count as L.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[[1.0], [3.0], [9.0]]])
      >>> pool(x, "mean", jnp.array([2])), pool(x, "last", jnp.array([2]))
      (Array([[2.]], dtype=float32), Array([[3.]], dtype=float32))
    """
    if lengths is None:
        return x.mean(-2) if how == "mean" else x[..., -1, :]
    position = jnp.arange(x.shape[-2])
    lengths = jnp.clip(as_lengths(lengths, x.shape[:-2]), 1, x.shape[-2])[..., None]
    if how == "last":
        return jnp.take_along_axis(x, lengths[..., None] - 1, axis=-2)[..., 0, :]
    inside = (position < lengths)[..., None]
    return jnp.where(inside, x, jnp.zeros_like(x)).sum(-2) / lengths.astype(x.dtype)


def pair_features(pooled: Float[Array, "*B 2 D"]) -> Float[Array, "*B 4*D"]:
    r"""What the retrieval head sees of two documents: :math:`[x_1, x_2, x_1 - x_2, x_1 x_2]`.

    Example:
      >>> import jax.numpy as jnp
      >>> pair_features(jnp.array([[3.0], [2.0]]))
      Array([3., 2., 1., 6.], dtype=float32)
    """
    first, second = pooled[..., 0, :], pooled[..., 1, :]
    return jnp.concatenate([first, second, first - second, first * second], axis=-1)
