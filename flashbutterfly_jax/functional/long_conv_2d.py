"""The long convolution of images: along both axes at once, each causal or not, by the convolution of sequences."""

import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flashbutterfly_jax.functional.arguments import floating, shaped
from flashbutterfly_jax.functional.long_conv import long_conv
from flashbutterfly_jax.typing import ArrayLike, Implementations, Precision, checked_by_hand


@checked_by_hand
def long_conv_2d(
    u: Annotated[ArrayLike, "*B D H W"],
    kernel: Annotated[ArrayLike, "*Q *C D Kh Kw"],
    skip: Annotated[ArrayLike, "*C D"] | None = None,
    *,
    causal: bool | tuple[bool, bool] = False,
    pre_gate: Annotated[ArrayLike, "*B D H W"] | None = None,
    post_gate: Annotated[ArrayLike, "*BC D H W"] | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*BC D H W"]:
    r"""Convolves each feature of an image with its own kernel, as large as the image or of any other size.

    .. math:: y_{h,w} = \sum_q \sum_{i,j} k^q_{i,j}\, u_{h - a_q(i),\, w - b_q(j)} + d\, u_{h,w}

    with zeros outside the image. The kernel is stored by quadrants q, each with K_h x K_w taps that start at the pixel
    and move away from it: along an axis, tap i of a forward quadrant looks back by :math:`a(i) = i`, and tap i of a
    reverse quadrant ahead, :math:`a(i) = -(i + 1)`, as a reverse kernel of `long_conv` does. So no lag is in two
    quadrants. A causal axis has forward quadrants only:

    ====================  ==========================================================  =================
    ``causal=``           quadrants, by their directions along height and width       kernel
    ====================  ==========================================================  =================
    ``(True, True)``      one, and no axis of quadrants                               ``(*C, D, Kh, Kw)``
    ``(True, False)``     forward-forward, forward-reverse                            ``(2, *C, D, Kh, Kw)``
    ``(False, True)``     forward-forward, reverse-forward                            ``(2, *C, D, Kh, Kw)``
    ``(False, False)``    forward-forward, forward-reverse, reverse-forward,          ``(4, *C, D, Kh, Kw)``
                          reverse-reverse
    ====================  ==========================================================  =================

    The authors of Fu et al. (https://arxiv.org/abs/2302.06646) released no code for their two-dimensional layer, so
    this form is a reconstruction: full kernels, not the outer products of S4ND. Squash applies as it is.

    It is computed as one convolution of sequences: with rows laid one after the other, and as many zeros between two
    as lags reach across, the lag (a, b) is the lag a S + b for rows S apart. That is exact, pads to the same
    number of points as a two-dimensional FFT does, and runs on every implementation of `long_conv`, whose dtypes,
    transformations and limits are therefore those here; its length is (H - 1) S + W, with S at most 2W - 1.

    Args:
      u: the image, ``(*B, D, H, W)``, of a real floating-point dtype. Array-likes are accepted here and below.
      kernel: as in the table, with ``*C`` none or one axis of kernels over the same u. Taps that reach past the image
        change nothing.
      skip: the weight of u itself, ``(D,)``, or ``(C, D)`` where the kernel has channels.
      causal: for the height and for the width, whether an output sees no later row and no later column; one bool says
        so of both. With both, it sees what is neither below nor to the right.
      pre_gate: ``(*B, D, H, W)``; multiplies u.
      post_gate: ``(*B, D, H, W)``, shared by the channels, or ``(*B, C, D, H, W)``; multiplies the result.
      precision: of `long_conv`.
      implementation: of `long_conv`.

    Returns:
      ``(*B, D, H, W)``, or ``(*B, C, D, H, W)`` where the kernel has channels.

    Raises:
      ValueError: if an argument has a wrong shape, dtype or value.
      NotImplementedError: if the request is valid, but no implementation named supports it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flashbutterfly_jax import long_conv_2d
      >>> u = jnp.zeros((1, 3, 3)).at[0, 1, 1].set(1.0)
      >>> quadrants = jnp.arange(1.0, 5.0).reshape(4, 1, 1, 1)  # one tap each
      >>> long_conv_2d(u, quadrants).round(4) + 0
      Array([[[4., 3., 0.],
              [2., 1., 0.],
              [0., 0., 0.]]], dtype=float32)
    """
    directions = _directions(causal)
    u = _whole_images("u", u)
    if u.ndim < 3:
        raise ValueError(f"u must have shape (*B, D, H, W), at least three axes; got shape {u.shape}.")
    *batch, features, height, width = u.shape
    kernel = _whole_images("kernel", kernel)
    quadrants = math.prod(directions)
    leading = () if quadrants == 1 else (quadrants,)
    channels = kernel.shape[len(leading) : -3]
    if (
        kernel.ndim not in (3 + len(leading), 4 + len(leading))
        or kernel.shape[: len(leading)] != leading
        or kernel.shape[-3] != features
        or min(kernel.shape[-2:]) < 1
    ):
        stack = "".join(f"{count}, " for count in leading)
        raise ValueError(
            f"kernel must have shape ({stack}D, Kh, Kw) or ({stack}C, D, Kh, Kw) with Kh, Kw >= 1, with D = {features} "
            f"as in u of shape {u.shape}, and with {quadrants} quadrants for causal = {causal}; "
            f"got shape {kernel.shape}."
        )
    skip = shaped("skip", skip, (*channels, features), of="kernel without its quadrants and taps")
    pre_gate = shaped("pre_gate", pre_gate, u.shape, of="u")
    result_shape = (*batch, *channels, features, height, width)
    post_gate = shaped("post_gate", post_gate, u.shape, result_shape, of="u or of the result")

    reach = _reach(directions, kernel.shape[-2:], (height, width))
    stride = max(width + max(reach.forward[1] - 1, reach.reverse[1]), 1)
    kernel = kernel.reshape(*directions, *channels, *kernel.shape[-3:])
    forward, reverse = _as_sequences(kernel, reach, stride)
    y = long_conv(
        _lay_rows(u, stride),
        forward,
        skip,
        reverse_kernel=reverse,
        pre_gate=None if pre_gate is None else _lay_rows(pre_gate, stride),
        post_gate=None if post_gate is None else _lay_rows(post_gate, stride),
        precision=precision,
        implementation=implementation,
    )
    whole = jnp.pad(y, ((0, 0),) * (y.ndim - 1) + ((0, height * stride - y.shape[-1]),))
    return whole.reshape(*y.shape[:-1], height, stride)[..., :width]


class _Reach(NamedTuple):
    """How many taps of a quadrant reach the image, along height and width; of a reverse one none if that is causal."""

    forward: tuple[int, int]
    reverse: tuple[int, int]


def _reach(directions: tuple[int, int], taps: tuple[int, ...], size: tuple[int, int]) -> _Reach:
    forward = [max(min(k, n), 1) for k, n in zip(taps, size, strict=True)]
    reverse = [max(min(k, n - 1), 0) if both == 2 else 0 for both, k, n in zip(directions, taps, size, strict=True)]
    return _Reach((forward[0], forward[1]), (reverse[0], reverse[1]))


def _lay_rows(x: Float[Array, "*B H W"], stride: int) -> Float[Array, "*B L"]:
    """The rows of an image one after the other, each starting a stride after the one before."""
    *batch, height, width = x.shape
    length = (height - 1) * stride + width if height and width else 0
    spread = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, stride - width),))
    return spread.reshape(*batch, height * stride)[..., :length]


def _as_sequences(
    quadrants: Float[Array, "Qh Qw *C D Kh Kw"], reach: _Reach, stride: int
) -> tuple[Float[Array, "*C D K"], Float[Array, "*C D K"] | None]:
    """The kernel of rows a stride apart, and the one that looks ahead: the tap of lag (a, b) becomes that of aS + b.

    All lags are put in one image, from the furthest ahead to the furthest back along both axes, whose rows are then
    laid out like those of u, and cut before lag 0.
    """
    (rows, columns), (rows_ahead, columns_ahead) = reach
    halves = [
        _both_ways([quadrants[a, b] for b in range(quadrants.shape[1])], columns, columns_ahead, axis=-1)
        for a in range(quadrants.shape[0])
    ]
    image = _both_ways(halves, rows, rows_ahead, axis=-2)
    taps = _lay_rows(image, stride)
    before = rows_ahead * stride + columns_ahead
    forward, reverse = taps[..., before:], jnp.flip(taps[..., :before], -1)
    if before == 0:
        return forward, None
    longest = max(forward.shape[-1], before)
    forward, reverse = (
        jnp.pad(part, ((0, 0),) * (part.ndim - 1) + ((0, longest - part.shape[-1]),)) for part in (forward, reverse)
    )
    return forward, reverse


def _both_ways(parts: list[Array], taps: int, taps_ahead: int, *, axis: int) -> Array:
    """The taps of a forward part, after those of the reverse part, if there is one, from the furthest on."""
    forward, *reverse = parts
    ahead = [jnp.flip(jax.lax.slice_in_dim(part, 0, taps_ahead, axis=axis), axis) for part in reverse]
    return jnp.concatenate([*ahead, jax.lax.slice_in_dim(forward, 0, taps, axis=axis)], axis)


def _directions(causal: Any) -> tuple[int, int]:
    """Directions of the lags along height and width: 1 if causal, 2 if not."""
    pair = (causal, causal) if isinstance(causal, bool) else causal
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(axis, bool) for axis in pair):
        raise ValueError(f"causal must be a bool, or one for the height and one for the width; got {causal!r}.")
    return 2 - pair[0], 2 - pair[1]


def _whole_images(name: str, value: Any) -> Array:
    array = floating(name, value)
    if array.ndim >= 2 and (axes := [axis for axis in jax.typeof(array).sharding.spec[-2:] if axis is not None]):
        raise ValueError(
            f"{name} must not be sharded along its last two axes, since every output needs all of them; got {axes} of "
            f"the mesh there. Call jax.sharding.reshard first."
        )
    return array
