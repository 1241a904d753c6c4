"""The long convolution layer of images as an NNX module."""

from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flashbutterfly_jax.models import layer, layer_2d
from flashbutterfly_jax.models.checks import resolve_deterministic
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Implementations, KernelTransform, Precision


class LongConv2D(nnx.Module):
    """A long convolution over height and width, then a gated linear unit over the features.

    Equations, dtypes, parameters and arguments are those of `flashbutterfly_jax.linen.LongConv2D`, and under the same
    parameters so is the result, to the last bit. ``deterministic`` is False until `eval` says otherwise.

    Args:
      features: D, of the input and of the output.
      kernel_size: (Kh, Kw), of each quadrant; taps beyond the size of the input are not used.
      channels: C, kernels for each feature.
      causal: whether it sees no later row, and no later column. Each axis that is not doubles the quadrants.
      squash_threshold: of `flashbutterfly_jax.squash`; 0 is none.
      smooth_width: of `flashbutterfly_jax.smooth` along each axis, odd; 1 is none.
      kernel_dropout_rate: of `flashbutterfly_jax.kernel_dropout`.
      dropout_rate: of the dropout before the output projection.
      kernel_transform: replaces smooth, squash and kernel dropout.
      kernel_init: initialises the kernel. One that lets the squash kill more than 99 % of the taps draws a warning.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the matrix products.
      deterministic: True leaves dropout out. The call may overrule it.
      implementation: of `flashbutterfly_jax.long_conv_2d`.
      rngs: streams ``params`` and, where there is dropout, ``dropout``.

    Raises:
      ValueError: here for a wrong argument, at the call for a wrong x.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flashbutterfly_jax as fb
      >>> layer = fb.nnx.LongConv2D(features=8, kernel_size=(12, 10), causal=(True, False), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 12, 10, 8))).shape
      (2, 12, 10, 8)
      >>> layer.kernel.shape
      (4, 8, 12, 10)
    """

    def __init__(
        self,
        features: int,
        kernel_size: Sequence[int],
        channels: int = 2,
        causal: Sequence[bool] = (False, False),
        squash_threshold: float = layer.DEFAULT_SQUASH_THRESHOLD,
        smooth_width: int = 1,
        kernel_dropout_rate: float = 0.0,
        dropout_rate: float = 0.0,
        kernel_transform: KernelTransform | None = None,
        kernel_init: Callable = layer.DEFAULT_KERNEL_INIT,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        deterministic: bool = False,
        implementation: Implementations = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.features, self.channels = features, channels
        # Tuples, for NNX would take the parts of a list for parts of its state.
        self.kernel_size = tuple(kernel_size) if isinstance(kernel_size, list) else kernel_size
        self.causal = tuple(causal) if isinstance(causal, list) else causal
        self.squash_threshold, self.smooth_width = squash_threshold, smooth_width
        self.kernel_dropout_rate, self.dropout_rate = kernel_dropout_rate, dropout_rate
        self.kernel_transform, self.kernel_init = kernel_transform, kernel_init
        self.dtype, self.precision = dtype, precision
        self.deterministic = deterministic
        self.implementation = tuple(implementation) if isinstance(implementation, list) else implementation
        layer_2d.check_long_conv_2d(self)
        layer_2d.warn_if_dead_2d(self)

        self.kernel = nnx.Param(kernel_init(rngs.params(), layer_2d.kernel_shape_2d(self), param_dtype))
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (channels, features), param_dtype))
        init = layer.uniform_fan_in(channels * features)
        self.output = nnx.Linear(
            channels * features,
            2 * features,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=init,
            bias_init=init,
            rngs=rngs,
        )
        # Without dropout no stream is asked for, so that rngs need not have one.
        self.kernel_dropout_rngs = rngs.dropout.fork() if kernel_dropout_rate > 0 else None
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate > 0 else None)

    def __call__(
        self, x: Annotated[ArrayLike, "*B H W D"], *, deterministic: bool | None = None
    ) -> Float[Array, "*B H W D"]:
        deterministic = resolve_deterministic(deterministic, self.deterministic, matters=True)
        h = layer_2d.convolve_channels_2d(
            x,
            layer_2d.regularize_kernel_2d(self, self.kernel[...], self.kernel_dropout_rngs, deterministic),
            self.skip[...],
            causal=self.causal,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
        )
        return nnx.glu(self.output(self.dropout(h, deterministic=deterministic)))
