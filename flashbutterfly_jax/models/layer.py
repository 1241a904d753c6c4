"""The long convolution layer of Fu et al. 2023 without its parameters: what `linen` and `nnx` both run."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from flashbutterfly_jax.functional import LearnedButterfly, kernel_dropout, learned_long_conv, long_conv, smooth, squash
from flashbutterfly_jax.initializers import random, warn_if_mostly_squashed
from flashbutterfly_jax.models.checks import as_lengths, as_sequence, check_positive, check_rate
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Implementations, KernelTransform, Precision

DEFAULT_SQUASH_THRESHOLD = 0.003  # of the paper code's layer configuration; its class default of 0.1 kills every tap
DEFAULT_KERNEL_INIT = random()


@runtime_checkable
class LongConvArguments(Protocol):
    """The constructor arguments that the Linen and the NNX layer share."""

    features: int
    kernel_length: int
    channels: int
    bidirectional: bool
    squash_threshold: float
    smooth_width: int
    kernel_dropout_rate: float
    dropout_rate: float
    kernel_transform: KernelTransform | None
    butterfly: LearnedButterfly | None

    @property
    def kernel_init(self) -> Callable: ...


def check_long_conv(layer: LongConvArguments) -> None:
    """Refuses a layer that cannot run.

    Raises:
      ValueError: naming the first argument that is wrong.
    """
    check_positive("features", layer.features)
    check_positive("kernel_length", layer.kernel_length)
    check_positive("channels", layer.channels)
    check_positive("smooth_width", layer.smooth_width)
    if layer.smooth_width % 2 == 0:
        raise ValueError(f"smooth_width must be odd, so that the window has a centre; got {layer.smooth_width}.")
    if not layer.squash_threshold >= 0:
        raise ValueError(f"squash_threshold must be >= 0; got {layer.squash_threshold}.")
    check_rate("kernel_dropout_rate", layer.kernel_dropout_rate)
    check_rate("dropout_rate", layer.dropout_rate)
    replaced = (layer.smooth_width, layer.squash_threshold, layer.kernel_dropout_rate)
    if layer.kernel_transform is not None and replaced != (1, DEFAULT_SQUASH_THRESHOLD, 0):
        raise ValueError(
            "kernel_transform replaces smoothing, squash and kernel dropout, so their arguments must keep their "
            f"defaults; got smooth_width, squash_threshold, kernel_dropout_rate = {replaced}."
        )
    if layer.butterfly is not None:
        if not isinstance(layer.butterfly, LearnedButterfly):
            raise ValueError(f"butterfly must be a LearnedButterfly or None; got {layer.butterfly!r}.")
        layer.butterfly.plan(layer.kernel_length)
        if layer.butterfly.causal and layer.bidirectional:
            raise ValueError(
                'bidirectional must be False with a causal butterfly; use LearnedButterfly("right_angle"), which looks '
                "ahead; got True."
            )


def kernel_shape(layer: LongConvArguments) -> tuple[int, int, int]:
    """``(C', D, K)``: a bidirectional layer stores its C reverse kernels after its C forward ones."""
    return layer.channels * (2 if layer.bidirectional else 1), layer.features, layer.kernel_length


def warn_if_dead(layer: LongConvArguments) -> None:
    """Warns where the squash will leave next to nothing of a new kernel.

    Once for each configuration: JAX may trace one initialisation several times.
    """
    if layer.kernel_transform is None:
        _warn_once(layer.kernel_init, layer.squash_threshold, kernel_shape(layer), layer.smooth_width)


@functools.cache
def _warn_once(init, threshold, shape, smooth_width):
    warn_if_mostly_squashed(init, threshold, shape, smooth_width=smooth_width)


def regularize_kernel(
    layer: LongConvArguments,
    kernel: Float[Array, "R D K"],
    next_key: Callable[[], PRNGKeyArray] | None,
    deterministic: bool,
) -> Float[Array, "R D K"]:
    """The kernel that is convolved with: ``kernel_transform`` of it, or smooth, then squash, then dropout.

    Args:
      layer: whose arguments say how.
      kernel: as stored.
      next_key: makes the random key of the dropout; called in training only, where the rate is not 0.
      deterministic: leaves the dropout out.
    """
    if layer.kernel_transform is not None:
        return layer.kernel_transform(kernel)
    kernel = squash(smooth(kernel, layer.smooth_width), layer.squash_threshold)
    if deterministic or layer.kernel_dropout_rate == 0 or next_key is None:
        return kernel
    return kernel_dropout(kernel, layer.kernel_dropout_rate, next_key())


def convolve_channels(
    x: Annotated[ArrayLike, "*B L D"],
    kernel: Float[Array, "R D K"],
    skip: Float[Array, "C D"],
    *,
    lengths: Annotated[ArrayLike, "*B"] | None = None,
    butterfly: LearnedButterfly | None = None,
    butterfly_blocks: dict[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*B L CD"]:
    r"""The layer up to its output projection: every kernel over every feature, then the exact GELU.

    .. math:: h_{t,\,cD+d} = \mathrm{GELU}\Big(\sum_s k_{c,d,t-s}\, x_{s,d} + b_{c,d}\, x_{t,d}\Big)

    Channels are flattened with the channel outermost, as in the paper's code. The result has ``dtype``, or what the
    arguments promote to; the kernel keeps its own.

    Args:
      x: the sequence.
      kernel: one kernel for each channel, or two: with R = 2C rows the last C look ahead.
      skip: the weight of x itself.
      lengths: positions from here on are padding and count as zero, for the skip too.
      butterfly: None convolves; otherwise `flashbutterfly_jax.learned_long_conv` runs.
      butterfly_blocks: its parameters.
      dtype: of the computation; None promotes the arguments.
      precision: passed on to whichever of the two convolves.
      implementation: likewise.

    Raises:
      ValueError: if an argument has a wrong shape or dtype.
      NotImplementedError: if no implementation named supports the request.

    Example:
      >>> import jax.numpy as jnp
      >>> h = convolve_channels(jnp.ones((3, 1)), jnp.ones((1, 1, 3)), jnp.zeros((1, 1)))
      >>> [round(value, 2) for value in h[:, 0].tolist()]  # the GELU of 1, 2 and 3
      [0.84, 1.95, 3.0]
    """
    channels, features = skip.shape
    x = mask_padding(as_sequence(x, features), lengths)
    u = jnp.swapaxes(x, -1, -2).astype(dtype or jnp.result_type(x, kernel, skip))
    reverse_kernel = kernel[channels:] if kernel.shape[0] == 2 * channels else None
    convolve: Callable[..., Array] = long_conv
    if butterfly is not None:
        convolve = functools.partial(learned_long_conv, blocks=butterfly_blocks or {}, butterfly=butterfly)
    options: dict[str, Any] = {"precision": precision, "implementation": implementation}
    y = convolve(u, kernel[:channels], skip, reverse_kernel=reverse_kernel, **options)
    flat = y.reshape(*y.shape[:-3], channels * features, y.shape[-1])
    return jax.nn.gelu(jnp.swapaxes(flat, -1, -2), approximate=False)


def mask_padding(x: Float[Array, "*B L D"], lengths: Annotated[ArrayLike, "*B"] | None) -> Float[Array, "*B L D"]:
    """The sequence with zeros from each one's length on, whatever was there (NaN included)."""
    if lengths is None:
        return x
    inside = jnp.arange(x.shape[-2]) < as_lengths(lengths, x.shape[:-2])[..., None]
    return jnp.where(inside[..., None], x, jnp.zeros_like(x))


def uniform_fan_in(fan_in: int) -> Callable[..., Array]:
    r"""Initialiser of the weights and biases of a dense layer, :math:`U(\pm 1/\sqrt{\mathrm{fan\_in}})`.

    PyTorch's default and therefore the paper's; Flax gives its dense layers other ones.

    Example:
      >>> import jax
      >>> bool(abs(uniform_fan_in(4)(jax.random.key(0), (4, 8), "float32")).max() <= 0.5)
      True
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
