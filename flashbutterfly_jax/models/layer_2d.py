"""The long convolution layer of images without its parameters: what `linen` and `nnx` both run."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from flashbutterfly_jax.functional import kernel_dropout, long_conv_2d, smooth, squash
from flashbutterfly_jax.initializers import geometric_decay
from flashbutterfly_jax.models.checks import check_positive, check_rate
from flashbutterfly_jax.models.layer import DEFAULT_SQUASH_THRESHOLD, _warn_once
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Implementations, KernelTransform, Precision


@runtime_checkable
class LongConv2DArguments(Protocol):
    """The constructor arguments that the Linen and the NNX layer share."""

    features: int
    kernel_size: Sequence[int]
    channels: int
    causal: Sequence[bool]
    squash_threshold: float
    smooth_width: int
    kernel_dropout_rate: float
    dropout_rate: float
    kernel_transform: KernelTransform | None

    @property
    def kernel_init(self) -> Callable: ...


def check_long_conv_2d(layer: LongConv2DArguments) -> None:
    """Refuses a layer that cannot run.

    Raises:
      ValueError: naming the first argument that is wrong.
    """
    for name in ("features", "channels", "smooth_width"):
        check_positive(name, getattr(layer, name))
    for name in ("kernel_size", "causal"):
        pair = getattr(layer, name)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{name} must be a pair, of the height and of the width; got {pair!r}.")
    for taps in layer.kernel_size:
        check_positive("kernel_size", taps)
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
    if isinstance(layer.kernel_init, geometric_decay):
        raise ValueError(
            "kernel_init must be an initialiser of images, such as flashbutterfly_jax.initializers.random() or "
            f"geometric_decay_2d(); got {layer.kernel_init}, which decays along one axis only."
        )


def quadrants(layer: LongConv2DArguments) -> int:
    """Of the kernel: one for each direction along the height and the width."""
    return math.prod(1 if axis else 2 for axis in layer.causal)


def kernel_shape_2d(layer: LongConv2DArguments) -> tuple[int, int, int, int]:
    """``(QC, D, Kh, Kw)``: the C kernels of a quadrant, then those of the next, as `long_conv_2d` orders them."""
    height, width = layer.kernel_size
    return quadrants(layer) * layer.channels, layer.features, height, width


def warn_if_dead_2d(layer: LongConv2DArguments) -> None:
    """Warns, once for each configuration, where the squash will leave next to nothing of a new kernel."""
    if layer.kernel_transform is None:
        rows, features, height, width = kernel_shape_2d(layer)
        # As a kernel of sequences with as many taps: a window of w x w averages as many as one of length w * w.
        shape = (rows, features, height * width)
        _warn_once(layer.kernel_init, layer.squash_threshold, shape, layer.smooth_width**2)


def regularize_kernel_2d(
    layer: LongConv2DArguments,
    kernel: Float[Array, "R D Kh Kw"],
    next_key: Callable[[], PRNGKeyArray] | None,
    deterministic: bool,
) -> Float[Array, "R D Kh Kw"]:
    """The kernel that is convolved with: ``kernel_transform`` of it, or smooth, then squash, then dropout.

    Each quadrant is smoothed by itself, along its width and then along its height.

    Args:
      layer: whose arguments say how.
      kernel: as stored.
      next_key: makes the random key of the dropout; called in training only, where the rate is not 0.
      deterministic: leaves the dropout out.
    """
    if layer.kernel_transform is not None:
        return layer.kernel_transform(kernel)
    along_width = smooth(kernel, layer.smooth_width)
    along_both = jnp.swapaxes(smooth(jnp.swapaxes(along_width, -1, -2), layer.smooth_width), -1, -2)
    kernel = squash(along_both, layer.squash_threshold)
    if deterministic or layer.kernel_dropout_rate == 0 or next_key is None:
        return kernel
    return kernel_dropout(kernel, layer.kernel_dropout_rate, next_key())


def convolve_channels_2d(
    x: Annotated[ArrayLike, "*B H W D"],
    kernel: Float[Array, "R D Kh Kw"],
    skip: Float[Array, "C D"],
    *,
    causal: Sequence[bool],
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*B H W CD"]:
    r"""The layer up to its output projection: every kernel over every feature, then the exact GELU.

    Channels are flattened with the channel outermost. The result has ``dtype``, or what the arguments promote to; the
    kernel keeps its own.

    Args:
      x: the image.
      kernel: R = QC, as in `kernel_shape_2d`.
      skip: the weight of x itself.
      causal: of `flashbutterfly_jax.long_conv_2d`.
      dtype: of the computation; None promotes the arguments.
      precision: passed on to `flashbutterfly_jax.long_conv_2d`.
      implementation: likewise.

    Raises:
      ValueError: if an argument has a wrong shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> x, kernel = jnp.ones((2, 2, 1)), jnp.ones((1, 1, 2, 2))
      >>> h = convolve_channels_2d(x, kernel, jnp.zeros((1, 1)), causal=(True, True))
      >>> [round(value, 2) for value in h.ravel().tolist()]  # the GELU of 1, 2, 2 and 4
      [0.84, 1.95, 1.95, 4.0]
    """
    channels, features = skip.shape
    x = as_image(x, features)
    u = jnp.moveaxis(x, -1, -3).astype(dtype or jnp.result_type(x, kernel, skip))
    rows = kernel.shape[0] // channels
    by_quadrant = kernel.reshape(*(() if rows == 1 else (rows,)), channels, *kernel.shape[1:])
    y = long_conv_2d(
        u, by_quadrant, skip, causal=(causal[0], causal[1]), precision=precision, implementation=implementation
    )
    flat = y.reshape(*y.shape[:-4], channels * features, *y.shape[-2:])
    return jax.nn.gelu(jnp.moveaxis(flat, -3, -1), approximate=False)


def as_image(x: ArrayLike, features: int, *, name: str = "features") -> Float[Array, "*B H W D"]:
    """The image as an array. Refuses whatever is not a real floating-point ``(*B, H, W, features)``."""
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"x must have a real floating-point dtype; got {array.dtype}.")
    if array.ndim < 3 or array.shape[-1] != features:
        raise ValueError(
            f"x must have shape (*B, H, W, {features}), the last axis being {name}; got shape {array.shape}."
        )
    return array
