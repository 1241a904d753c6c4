"""A layer with its normalisation, dropout and residual connection as an NNX module."""

from collections.abc import Callable
from typing import Annotated, Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flashbutterfly_jax.models.checks import check_choice, check_positive, check_rate, resolve_deterministic
from flashbutterfly_jax.models.residual import EPSILON, MOMENTUM, NORMS, Norm, tied_axes
from flashbutterfly_jax.typing import ArrayLike, DTypeLike


class ResidualBlock(nnx.Module):
    """A residual connection around a layer, with the normalisation inside the branch or after the sum.

    Equations, parameters and arguments are those of `flashbutterfly_jax.linen.ResidualBlock`, and under the same
    parameters so is the result, to the last bit. ``deterministic`` is False until `eval` says otherwise.

    Args:
      features: D.
      layer: makes the layer when called with ``rngs``, such as
        ``functools.partial(LongConv, features=64, kernel_length=1024)``.
      norm: ``"layer"`` or ``"batch"``.
      prenorm: normalises the input of the layer; False normalises the sum.
      dropout_rate: of the dropout of the layer's output.
      tie_dropout: drops a feature at all positions of a sequence or at none.
      position_axes: axes of positions, before that of the features: 1 for a sequence, 2 for an image.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters of the norm.
      deterministic: True evaluates: no dropout, and running statistics. The call may overrule it.
      rngs: streams ``params`` and, where there is dropout, ``dropout``.

    Raises:
      ValueError: for a wrong argument.

    Example:
      >>> import functools, jax.numpy as jnp
      >>> from flax import nnx
      >>> import flashbutterfly_jax as fb
      >>> layer = functools.partial(fb.nnx.LongConv, features=8, kernel_length=64)
      >>> block = fb.nnx.ResidualBlock(features=8, layer=layer, norm="batch", prenorm=True, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 64, 8))).shape
      (2, 64, 8)
    """

    def __init__(
        self,
        features: int,
        layer: Callable[..., nnx.Module],
        norm: Norm = "layer",
        prenorm: bool = False,
        dropout_rate: float = 0.0,
        tie_dropout: bool = True,
        position_axes: int = 1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        deterministic: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        check_choice("norm", norm, NORMS)
        check_rate("dropout_rate", dropout_rate)
        check_positive("position_axes", position_axes)
        self.prenorm, self.deterministic = prenorm, deterministic
        self.layer = layer(rngs=rngs)
        self.norm = make_norm(norm, features, dtype, param_dtype, rngs)
        tied = tied_axes(position_axes) if tie_dropout else ()
        self.dropout = nnx.Dropout(dropout_rate, broadcast_dims=tied, rngs=rngs if dropout_rate > 0 else None)

    def __call__(
        self,
        x: Annotated[ArrayLike, "*B L D"],
        *,
        lengths: Annotated[ArrayLike, "*B"] | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*B L D"]:
        x = jnp.asarray(x)
        deterministic = resolve_deterministic(deterministic, self.deterministic, matters=True)
        inside = normalize(self.norm, x, deterministic) if self.prenorm else x
        given = {} if lengths is None else {"lengths": lengths}  # a layer of images takes none
        branch = self.layer(inside, **given, deterministic=deterministic)
        y = x + self.dropout(branch, deterministic=deterministic)
        return y if self.prenorm else normalize(self.norm, y, deterministic)


def make_norm(
    norm: Norm, features: int, dtype: DTypeLike | None, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.LayerNorm | nnx.BatchNorm:
    """The normalisation named ``norm``."""
    types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "promote_dtype": _in_their_own_dtypes}
    if norm == "layer":
        return nnx.LayerNorm(features, epsilon=EPSILON, **types, rngs=rngs)
    return nnx.BatchNorm(features, epsilon=EPSILON, momentum=MOMENTUM, **types, rngs=rngs)


def normalize(norm: nnx.LayerNorm | nnx.BatchNorm, x: Float[Array, "*B L D"], deterministic: bool) -> Array:
    """The normalised sequence. Batch normalisation uses its running statistics where deterministic."""
    return norm(x, use_running_average=deterministic) if isinstance(norm, nnx.BatchNorm) else norm(x)


def _in_their_own_dtypes(arrays: tuple, *, dtype: DTypeLike | None) -> tuple:
    """Keeps statistics and parameters as precise as they are stored, as Linen does: the result alone gets ``dtype``.

    NNX would round them first, the running statistics to 8 bits of mantissa under bfloat16.
    """
    del dtype
    return arrays
