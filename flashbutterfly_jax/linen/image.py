"""A classifier of images as a Linen module."""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flashbutterfly_jax.linen.long_conv_2d import LongConv2D
from flashbutterfly_jax.linen.residual import ResidualBlock, make_norm
from flashbutterfly_jax.models.image import check_image_classifier, patches
from flashbutterfly_jax.models.layer import uniform_fan_in
from flashbutterfly_jax.models.residual import Norm
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Precision


class ImageClassifier(nn.Module):
    r"""Patch encoder, residual blocks of two-dimensional layers, mean over the image, linear head.

    What `SequenceClassifier` is for pixels in a row, for pixels on a grid: there is no positional encoding either.
    Non-overlapping patches are encoded by a dense layer; patches of size 1 are pixels. The authors' code for
    two-dimensional CIFAR encodes pixels by a dense layer and takes the mean, too; its long convolution they did not
    release.

    The logits have ``dtype``, or what x and the parameters promote to. The blocks are one block scanned over stacked
    parameters. Parameters: ``encoder``, ``blocks`` (each with a leading axis of ``num_layers``), ``final_norm`` where
    prenorm, ``head``.

    Attributes:
      num_classes: logits for each image.
      features: D, of every layer.
      num_layers: residual blocks.
      kernel_size: (Kh, Kw) in patches, of every layer.
      input_features: of each pixel.
      patch_size: pixels along each side of a patch.
      layer: makes the layer of each block, when called with ``features``, ``kernel_size``, ``dropout_rate``,
        ``dtype``, ``param_dtype``, ``precision`` and ``name``; bind other arguments by ``functools.partial``.
      norm: of the blocks, ``"layer"`` or ``"batch"``.
      prenorm: normalises the input of each layer, and the output of the last; False normalises each sum.
      dropout_rate: of the dropout inside each layer and after it.
      tie_dropout: of the dropout after each layer.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the matrix products.
      deterministic: True evaluates: no dropout, and running statistics. May be given at the call instead.
      scan_layers: False unrolls the scan.

    Raises:
      ValueError: at construction for a wrong argument, at the call for a wrong x.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> model = fb.linen.ImageClassifier(
      ...     num_classes=10, features=8, num_layers=3, kernel_size=(8, 6), patch_size=2
      ... )
      >>> x = jnp.ones((2, 16, 12, 3))
      >>> variables = jax.jit(model.init)(jax.random.key(0), x)
      >>> model.apply(variables, x).shape
      (2, 10)
      >>> variables["params"]["blocks"]["layer"]["kernel"].shape
      (3, 8, 8, 8, 6)
    """

    num_classes: int
    features: int
    num_layers: int
    kernel_size: Sequence[int]
    input_features: int = 3
    patch_size: int = 1
    layer: Callable[..., nn.Module] = LongConv2D
    norm: Norm = "layer"
    prenorm: bool = False
    dropout_rate: float = 0.0
    tie_dropout: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None
    deterministic: bool | None = None
    scan_layers: bool = True

    def __post_init__(self):
        check_image_classifier(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Annotated[ArrayLike, "*B H W input_features"], *, deterministic: bool | None = None
    ) -> Float[Array, "*B num_classes"]:
        deterministic = deterministic if deterministic is not None else self.deterministic
        grid = patches(self, x)
        h = self._blocks(self._dense(grid.shape[-1], self.features, "encoder")(grid), deterministic)
        if self.prenorm:
            h = make_norm(self.norm, deterministic, self.dtype, self.param_dtype, "final_norm")(h)
        return self._dense(self.features, self.num_classes, "head")(h.mean((-3, -2)))

    def _blocks(self, x, deterministic):
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block = ResidualBlock(
            features=self.features,
            layer=functools.partial(
                self.layer,
                features=self.features,
                kernel_size=self.kernel_size,
                dropout_rate=self.dropout_rate,
                precision=self.precision,
                **types,
            ),
            norm=self.norm,
            prenorm=self.prenorm,
            dropout_rate=self.dropout_rate,
            tie_dropout=self.tie_dropout,
            position_axes=2,
            name="blocks",
            **types,
        )
        scan = nn.scan(
            lambda block, x: (block(x, deterministic=deterministic), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
            unroll=1 if self.scan_layers else self.num_layers,
        )
        return scan(block, x)[0]

    def _dense(self, fan_in: int, features: int, name: str) -> nn.Module:
        init = uniform_fan_in(fan_in)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": self.precision}
        return nn.Dense(features, kernel_init=init, bias_init=init, name=name, **types)
