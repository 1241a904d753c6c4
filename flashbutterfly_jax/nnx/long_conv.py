"""The long convolution layer as an NNX module."""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flashbutterfly_jax.functional import LearnedButterfly
from flashbutterfly_jax.models import layer
from flashbutterfly_jax.models.checks import resolve_deterministic
from flashbutterfly_jax.nnx.butterfly import read
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Implementations, KernelTransform, Precision


class LongConv(nnx.Module):
    """A long convolution over time, then a gated linear unit over the features (Fu et al. 2023, section 3).

    Equations, dtypes, parameters and arguments are those of `flashbutterfly_jax.linen.LongConv`, and under the same
    parameters so is the result, to the last bit. What differs is NNX's: the parameters are made here, from ``rngs``,
    and ``deterministic`` is False until `eval` says otherwise.

    Args:
      features: D, of the input and of the output.
      kernel_length: K; taps beyond the length of the input are not used.
      channels: C, kernels for each feature.
      bidirectional: adds C kernels that look ahead.
      squash_threshold: of `flashbutterfly_jax.squash`; 0 is none.
      smooth_width: of `flashbutterfly_jax.smooth`, odd; 1 is none.
      kernel_dropout_rate: of `flashbutterfly_jax.kernel_dropout`.
      dropout_rate: of the dropout before the output projection.
      kernel_transform: replaces smooth, squash and kernel dropout.
      kernel_init: initialises the kernel. One that lets the squash kill more than 99 % of the taps draws a warning.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the matrix products.
      deterministic: True leaves dropout out. The call may overrule it.
      implementation: of `flashbutterfly_jax.long_conv`, or with a butterfly of `flashbutterfly_jax.learned_long_conv`.
      butterfly: None is the convolution. A `flashbutterfly_jax.LearnedButterfly` learns the blocks of its transforms as
        well; unless its form is causal, **the layer then looks ahead once trained**.
      rngs: streams ``params`` and, where there is dropout, ``dropout``.

    Raises:
      ValueError: here for a wrong argument, at the call for a wrong x or lengths.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flashbutterfly_jax as fb
      >>> layer = fb.nnx.LongConv(features=8, kernel_length=64, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 64, 8))).shape
      (2, 64, 8)
      >>> layer.kernel.shape, layer.skip.shape, layer.output.kernel.shape
      ((2, 8, 64), (2, 8), (16, 16))
    """

    def __init__(
        self,
        features: int,
        kernel_length: int,
        channels: int = 2,
        bidirectional: bool = False,
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
        butterfly: LearnedButterfly | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.features, self.kernel_length, self.channels = features, kernel_length, channels
        self.bidirectional = bidirectional
        self.squash_threshold, self.smooth_width = squash_threshold, smooth_width
        self.kernel_dropout_rate, self.dropout_rate = kernel_dropout_rate, dropout_rate
        self.kernel_transform, self.kernel_init = kernel_transform, kernel_init
        self.dtype, self.precision = dtype, precision
        self.deterministic = deterministic
        self.implementation = tuple(implementation) if isinstance(implementation, list) else implementation
        self.butterfly = butterfly
        layer.check_long_conv(self)
        layer.warn_if_dead(self)

        self.kernel = nnx.Param(kernel_init(rngs.params(), layer.kernel_shape(self), param_dtype))
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (channels, features), param_dtype))
        self.butterfly_blocks = None
        if butterfly is not None:
            blocks = butterfly.init(rngs.params(), features, kernel_length, param_dtype)
            self.butterfly_blocks = nnx.data(jax.tree.map(nnx.Param, blocks))
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
        self,
        x: Annotated[ArrayLike, "*B L D"],
        *,
        lengths: Annotated[ArrayLike, "*B"] | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*B L D"]:
        deterministic = resolve_deterministic(deterministic, self.deterministic, matters=True)
        h = layer.convolve_channels(
            x,
            layer.regularize_kernel(self, self.kernel[...], self.kernel_dropout_rngs, deterministic),
            self.skip[...],
            lengths=lengths,
            butterfly=self.butterfly,
            butterfly_blocks=read(self.butterfly_blocks),
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
        )
        return nnx.glu(self.output(self.dropout(h, deterministic=deterministic)))
