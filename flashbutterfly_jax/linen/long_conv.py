"""The long convolution layer as a Linen module."""

import functools
from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flashbutterfly_jax.functional import LearnedButterfly
from flashbutterfly_jax.models import layer
from flashbutterfly_jax.models.checks import resolve_deterministic
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Implementations, KernelTransform, Precision


class LongConv(nn.Module):
    r"""A long convolution over time, then a gated linear unit over the features (Fu et al. 2023, section 3).

    .. math::
        h = \mathrm{dropout}(\mathrm{GELU}(k * x + b \odot x)), \qquad
        y = a \odot \sigma(g), \quad [a, g] = h W + w

    where each of the D features has C kernels as long as the sequence. The kernel is learned directly and kept sparse:
    what is convolved with is ``kernel_transform(kernel)``, or else smooth, then squash, then dropout.

    The result has ``dtype``, or what x and the parameters promote to. The kernel stays in ``param_dtype`` through its
    transform and into the convolution, because a threshold of 0.003 means little in 8 bits of mantissa.

    Parameters: ``kernel (C, D, K)``, or ``(2C, D, K)`` where bidirectional, reverse kernels last; ``skip (C, D)``;
    ``output/kernel (CD, 2D)``, rows with the channel outermost; ``output/bias (2D,)``; and with a butterfly
    ``butterfly_blocks``, of `flashbutterfly_jax.LearnedButterfly.init`.

    Attributes:
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
      deterministic: True leaves dropout out. May be given at the call instead; needed only where there is dropout.
      implementation: of `flashbutterfly_jax.long_conv`, or with a butterfly of `flashbutterfly_jax.learned_long_conv`.
      butterfly: None is the convolution. A `flashbutterfly_jax.LearnedButterfly` learns the blocks of its transforms as
        well; unless its form is causal, **the layer then looks ahead once trained**.

    Raises:
      ValueError: at construction for a wrong argument, at the call for a wrong x or lengths.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> layer = fb.linen.LongConv(features=8, kernel_length=64)
      >>> x = jnp.ones((2, 64, 8))
      >>> variables = jax.jit(layer.init)(jax.random.key(0), x)
      >>> layer.apply(variables, x).shape
      (2, 64, 8)
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'kernel': (2, 8, 64), 'output': {'bias': (16,), 'kernel': (16, 16)}, 'skip': (2, 8)}
    """

    features: int
    kernel_length: int
    channels: int = 2
    bidirectional: bool = False
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
    butterfly: LearnedButterfly | None = None

    def __post_init__(self):
        layer.check_long_conv(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Annotated[ArrayLike, "*B L D"],
        *,
        lengths: Annotated[ArrayLike, "*B"] | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*B L D"]:
        matters = self.dropout_rate > 0 or self.kernel_dropout_rate > 0
        deterministic = resolve_deterministic(deterministic, self.deterministic, matters=matters)
        if self.is_initializing():
            layer.warn_if_dead(self)
        kernel = self.param("kernel", self.kernel_init, layer.kernel_shape(self), self.param_dtype)
        skip = self.param("skip", nn.initializers.normal(1.0), (self.channels, self.features), self.param_dtype)
        blocks = None
        if self.butterfly is not None:
            init_blocks = self.butterfly.init
            blocks = self.param("butterfly_blocks", init_blocks, self.features, self.kernel_length, self.param_dtype)
        h = layer.convolve_channels(
            x,
            layer.regularize_kernel(self, kernel, functools.partial(self.make_rng, "dropout"), deterministic),
            skip,
            lengths=lengths,
            butterfly=self.butterfly,
            butterfly_blocks=blocks,
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
