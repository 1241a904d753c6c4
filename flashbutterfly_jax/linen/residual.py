"""A layer with its normalisation, dropout and residual connection as a Linen module."""

from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flashbutterfly_jax.models.checks import check_choice, check_positive, check_rate, resolve_deterministic
from flashbutterfly_jax.models.residual import EPSILON, MOMENTUM, NORMS, Norm, tied_axes
from flashbutterfly_jax.typing import ArrayLike, DTypeLike


class ResidualBlock(nn.Module):
    r"""A residual connection around a layer, with the normalisation inside the branch or after the sum.

    .. math::
        y = x + \mathrm{dropout}(\mathrm{layer}(\mathrm{norm}(x))) \quad\text{or}\quad
        y = \mathrm{norm}(x + \mathrm{dropout}(\mathrm{layer}(x)))

    Parameters: ``layer`` and ``norm``. Batch normalisation keeps its running mean and variance in the collection
    ``batch_stats``; its statistics are over the batch and the length, padding included, as in the paper's code.

    Attributes:
      features: D.
      layer: makes the layer when called with ``name``, such as
        ``functools.partial(LongConv, features=64, kernel_length=1024)``.
      norm: ``"layer"`` or ``"batch"``.
      prenorm: normalises the input of the layer; False normalises the sum.
      dropout_rate: of the dropout of the layer's output.
      tie_dropout: drops a feature at all positions of a sequence or at none.
      position_axes: axes of positions, before that of the features: 1 for a sequence, 2 for an image.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters of the norm.
      deterministic: True evaluates: no dropout, and running statistics. May be given at the call instead.

    Raises:
      ValueError: at construction for a wrong argument.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> layer = functools.partial(fb.linen.LongConv, features=8, kernel_length=64)
      >>> block = fb.linen.ResidualBlock(features=8, layer=layer, norm="batch", prenorm=True)
      >>> x = jnp.ones((2, 64, 8))
      >>> variables = block.init(jax.random.key(0), x, deterministic=True)
      >>> y, updates = block.apply(variables, x, deterministic=False, mutable="batch_stats")
      >>> y.shape, updates["batch_stats"]["norm"]["mean"].shape
      ((2, 64, 8), (8,))
    """

    features: int
    layer: Callable[..., nn.Module]
    norm: Norm = "layer"
    prenorm: bool = False
    dropout_rate: float = 0.0
    tie_dropout: bool = True
    position_axes: int = 1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    deterministic: bool | None = None

    def __post_init__(self):
        check_choice("norm", self.norm, NORMS)
        check_rate("dropout_rate", self.dropout_rate)
        check_positive("position_axes", self.position_axes)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Annotated[ArrayLike, "*B L D"],
        *,
        lengths: Annotated[ArrayLike, "*B"] | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*B L D"]:
        x = jnp.asarray(x)
        deterministic = deterministic if deterministic is not None else self.deterministic
        norm = make_norm(self.norm, deterministic, self.dtype, self.param_dtype)
        drop = nn.Dropout(self.dropout_rate, broadcast_dims=tied_axes(self.position_axes) if self.tie_dropout else ())
        given = {} if lengths is None else {"lengths": lengths}  # a layer of images takes none
        branch = self.layer(name="layer")(norm(x) if self.prenorm else x, **given, deterministic=deterministic)
        resolved = resolve_deterministic(deterministic, None, matters=self.dropout_rate > 0)
        y = x + drop(branch, deterministic=resolved)
        return y if self.prenorm else norm(y)


def make_norm(
    norm: Norm, deterministic: bool | None, dtype: DTypeLike | None, param_dtype: DTypeLike, name: str = "norm"
) -> nn.Module:
    """The normalisation named ``norm`` of the module in whose call this is called."""
    if norm == "layer":
        return nn.LayerNorm(epsilon=EPSILON, dtype=dtype, param_dtype=param_dtype, name=name)
    running = resolve_deterministic(deterministic, None, matters=True)
    return nn.BatchNorm(running, epsilon=EPSILON, momentum=MOMENTUM, dtype=dtype, param_dtype=param_dtype, name=name)
