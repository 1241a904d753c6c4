"""The long convolution layer of images as a Linen module."""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flashbutterfly_jax.models import layer, layer_2d
from flashbutterfly_jax.models.checks import resolve_deterministic
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Implementations, KernelTransform, Precision


class LongConv2D(nn.Module):
    r"""A long convolution over height and width, then a gated linear unit over the features.

    .. math::
        h = \mathrm{dropout}(\mathrm{GELU}(k * x + b \odot x)), \qquad
        y = a \odot \sigma(g), \quad [a, g] = h W + w

    as `LongConv`, with `flashbutterfly_jax.long_conv_2d` for the convolution: each of the D features has C kernels as
    large as the image, learned directly, and convolved with after ``kernel_transform``, or else smooth along both
    axes, then squash, then dropout. The authors of Fu et al. released no code for their two-dimensional layer, so this
    one is a reconstruction. Dtypes are those of `LongConv`.

    Parameters: ``kernel (QC, D, Kh, Kw)``, with Q quadrants, those of one after those of another in the order of
    `flashbutterfly_jax.long_conv_2d`; ``skip (C, D)``; ``output/kernel (CD, 2D)``, rows with the channel outermost;
    ``output/bias (2D,)``.

    Attributes:
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
      deterministic: True leaves dropout out. May be given at the call instead; needed only where there is dropout.
      implementation: of `flashbutterfly_jax.long_conv_2d`.

    Raises:
      ValueError: at construction for a wrong argument, at the call for a wrong x.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> layer = fb.linen.LongConv2D(features=8, kernel_size=(12, 10))
      >>> x = jnp.ones((2, 12, 10, 8))
      >>> variables = jax.jit(layer.init)(jax.random.key(0), x)
      >>> layer.apply(variables, x).shape
      (2, 12, 10, 8)
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'kernel': (8, 8, 12, 10), 'output': {'bias': (16,), 'kernel': (16, 16)}, 'skip': (2, 8)}
    """

    features: int
    kernel_size: Sequence[int]
    channels: int = 2
    causal: Sequence[bool] = (False, False)
    squash_threshold: float = layer.DEFAULT_SQUASH_THRESHOLD
    smooth_width: int = 1
    kernel_dropout_rate: float = 0.0
    dropout_rate: float = 0.0
    kernel_transform: KernelTransform | None = None
    kernel_init: Callable = layer.DEFAULT_KERNEL_INIT
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None
    deterministic: bool | None = None
    implementation: Implementations = None

    def __post_init__(self):
        layer_2d.check_long_conv_2d(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Annotated[ArrayLike, "*B H W D"], *, deterministic: bool | None = None
    ) -> Float[Array, "*B H W D"]:
        matters = self.dropout_rate > 0 or self.kernel_dropout_rate > 0
        deterministic = resolve_deterministic(deterministic, self.deterministic, matters=matters)
        if self.is_initializing():
            layer_2d.warn_if_dead_2d(self)
        kernel = self.param("kernel", self.kernel_init, layer_2d.kernel_shape_2d(self), self.param_dtype)
        skip = self.param("skip", nn.initializers.normal(1.0), (self.channels, self.features), self.param_dtype)
        h = layer_2d.convolve_channels_2d(
            x,
            layer_2d.regularize_kernel_2d(self, kernel, functools.partial(self.make_rng, "dropout"), deterministic),
            skip,
            causal=self.causal,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
        )
        h = nn.Dropout(self.dropout_rate)(h, deterministic=deterministic)
        init = layer.uniform_fan_in(self.channels * self.features)
        output = nn.Dense(
            2 * self.features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=init,
            bias_init=init,
            name="output",
        )
        return nn.glu(output(h))
