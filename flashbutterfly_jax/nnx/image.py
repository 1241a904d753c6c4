"""A classifier of images as an NNX module."""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flashbutterfly_jax.models.checks import resolve_deterministic
from flashbutterfly_jax.models.image import check_image_classifier, patches
from flashbutterfly_jax.models.layer import uniform_fan_in
from flashbutterfly_jax.models.residual import Norm
from flashbutterfly_jax.nnx.long_conv_2d import LongConv2D
from flashbutterfly_jax.nnx.residual import ResidualBlock, make_norm, normalize
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Precision


class ImageClassifier(nnx.Module):
    """Patch encoder, residual blocks of two-dimensional layers, mean over the image, linear head.

    Inputs, parameters and arguments are those of `flashbutterfly_jax.linen.ImageClassifier`, and under the same
    parameters so is the result, to the last bit. ``deterministic`` is False until `eval` says otherwise.

    Args:
      num_classes: logits for each image.
      features: D, of every layer.
      num_layers: residual blocks.
      kernel_size: (Kh, Kw) in patches, of every layer.
      input_features: of each pixel.
      patch_size: pixels along each side of a patch.
      layer: makes the layer of each block, when called with ``features``, ``kernel_size``, ``dropout_rate``,
        ``dtype``, ``param_dtype``, ``precision`` and ``rngs``; bind other arguments by ``functools.partial``.
      norm: of the blocks, ``"layer"`` or ``"batch"``.
      prenorm: normalises the input of each layer, and the output of the last; False normalises each sum.
      dropout_rate: of the dropout inside each layer and after it.
      tie_dropout: of the dropout after each layer.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the matrix products.
      deterministic: True evaluates: no dropout, and running statistics. The call may overrule it.
      scan_layers: False unrolls the scan.
      rngs: streams ``params`` and, where there is dropout, ``dropout``.

    Raises:
      ValueError: here for a wrong argument, at the call for a wrong x.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flashbutterfly_jax as fb
      >>> model = fb.nnx.ImageClassifier(
      ...     num_classes=10, features=8, num_layers=3, kernel_size=(8, 6), patch_size=2, rngs=nnx.Rngs(0)
      ... )
      >>> model(jnp.ones((2, 16, 12, 3))).shape
      (2, 10)
      >>> model.blocks.layer.kernel.shape
      (3, 8, 8, 8, 6)
    """

    def __init__(
        self,
        num_classes: int,
        features: int,
        num_layers: int,
        kernel_size: Sequence[int],
        input_features: int = 3,
        patch_size: int = 1,
        layer: Callable[..., nnx.Module] = LongConv2D,
        norm: Norm = "layer",
        prenorm: bool = False,
        dropout_rate: float = 0.0,
        tie_dropout: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        deterministic: bool = False,
        scan_layers: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_classes, self.features, self.num_layers = num_classes, features, num_layers
        self.kernel_size = tuple(kernel_size) if isinstance(kernel_size, list) else kernel_size
        self.input_features, self.patch_size = input_features, patch_size
        self.norm, self.prenorm, self.dropout_rate = norm, prenorm, dropout_rate
        self.deterministic, self.scan_layers = deterministic, scan_layers
        check_image_classifier(self)

        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        make_layer = functools.partial(
            layer,
            features=features,
            kernel_size=self.kernel_size,
            dropout_rate=dropout_rate,
            precision=precision,
            **types,
        )

        @nnx.split_rngs(splits=num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> ResidualBlock:
            return ResidualBlock(features, make_layer, norm, prenorm, dropout_rate, tie_dropout, 2, **types, rngs=rngs)

        self.encoder = _make_dense(patch_size**2 * input_features, features, precision, types, rngs)
        self.blocks = stack(rngs)
        self.final_norm = make_norm(norm, features, **types, rngs=rngs) if prenorm else None
        self.head = _make_dense(features, num_classes, precision, types, rngs)

    def __call__(
        self, x: Annotated[ArrayLike, "*B H W input_features"], *, deterministic: bool | None = None
    ) -> Float[Array, "*B num_classes"]:
        deterministic = resolve_deterministic(deterministic, self.deterministic, matters=True)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, unroll=1 if self.scan_layers else self.num_layers)
        def scan(x: Array, block: ResidualBlock) -> Array:
            return block(x, deterministic=deterministic)

        h = scan(self.encoder(patches(self, x)), self.blocks)
        if self.final_norm is not None:
            h = normalize(self.final_norm, h, deterministic)
        return self.head(h.mean((-3, -2)))


def _make_dense(fan_in, features, precision, types, rngs):
    init = uniform_fan_in(fan_in)
    return nnx.Linear(fan_in, features, precision=precision, kernel_init=init, bias_init=init, **types, rngs=rngs)
