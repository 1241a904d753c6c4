"""What keeps a learned kernel smooth and sparse: pure functions of the kernel, to be composed before the convolution.

The paper's code applies smooth, then squash, then dropout.
"""

import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from flashbutterfly_jax.functional.arguments import floating
from flashbutterfly_jax.functional.spectral import irfft, rfft
from flashbutterfly_jax.typing import ArrayLike, checked_by_hand


@checked_by_hand
def squash(kernel: Annotated[ArrayLike, "*C D K"], threshold: float | Array) -> Float[Array, "..."]:
    r"""Moves every tap towards zero by the threshold, and the taps below it to exactly zero.

    .. math:: \operatorname{sign}(k) \max(|k| - \lambda, 0)

    is the soft threshold, the proximal step of an L1 penalty (Fu et al. 2023, section 3). Its derivative is 1 for a
    tap above the threshold and exactly 0 for the others: **a tap that is dead at initialisation stays dead**, so choose
    the threshold by the scale of the initialiser (`flashbutterfly_jax.initializers.warn_if_mostly_squashed`).

    Keeps the kernel's dtype. NaN stays NaN. A threshold of 0 is the identity.

    Args:
      kernel: of any shape. Array-likes are accepted.
      threshold: >= 0. A traced threshold is trusted.

    Raises:
      ValueError: if the threshold is negative or NaN, or the kernel is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> squash(jnp.array([-3.0, -1.0, 0.5, 2.0]), 1.0)
      Array([-2.,  0.,  0.,  1.], dtype=float32)
    """
    kernel = floating("kernel", kernel)
    if not isinstance(threshold, jax.core.Tracer) and not threshold >= 0:
        raise ValueError(f"threshold must be >= 0; got {threshold}.")
    threshold = jnp.asarray(threshold, kernel.dtype)
    # Not maximum(): its derivative at a tie is 1/2. Not |k| > threshold: that would turn NaN into 0. And a zero tap
    # under a zero threshold passes its gradient, or a kernel of zeros could never be learned.
    dead = (jnp.abs(kernel) <= threshold) & (threshold > 0)
    return jnp.where(dead, jnp.zeros_like(kernel), kernel - jnp.sign(kernel) * threshold)


@checked_by_hand
def smooth(kernel: Annotated[ArrayLike, "*C D K"], width: int) -> Float[Array, "..."]:
    r"""Moving average of each kernel over time.

    .. math:: \frac{1}{w} \sum_{|i| \le (w-1)/2} k_{t+i}

    Taps outside the kernel count as zero and the divisor is w at the edges too, as in the paper's code. Keeps the
    kernel's dtype.

    Args:
      kernel: ``(..., K)``, array-likes accepted; the last axis is averaged.
      width: odd and >= 1; 1 is the identity.

    Raises:
      ValueError: if the width is even or below 1, or the kernel is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> smooth(jnp.array([3.0, 6.0, 9.0]), 3)
      Array([3., 6., 5.], dtype=float32)
    """
    kernel = _odd_window(kernel, width)
    window = (1,) * (kernel.ndim - 1) + (width,)
    padding = ((0, 0),) * (kernel.ndim - 1) + ((width // 2, width // 2),)
    zero = np.zeros((), kernel.dtype)  # a constant under jit too: only then does JAX know that this is a sum
    return jax.lax.reduce_window(kernel, zero, jax.lax.add, window, (1,) * kernel.ndim, padding) / width


@checked_by_hand
def smooth_frequency(kernel: Annotated[ArrayLike, "*C D K"], width: int) -> Float[Array, "..."]:
    r"""Gaussian-weighted sum of each kernel over neighbouring frequencies: the paper code's other smoothing.

    .. math:: \hat k_f \leftarrow \sum_{|i| \le (w-1)/2} e^{-i^2/2}\, \hat k_{f+i}

    over the real FFT of length K, frequencies outside 0 … K/2 counting as zero. The weights are not normalised, as in
    the paper's code: a width of 7 scales the kernel's first tap by about 2.5. Keeps the kernel's dtype; computes in
    float32 at least.

    Args:
      kernel: ``(..., K)``, array-likes accepted; the last axis is transformed.
      width: odd and >= 1; 1 is the identity.

    Raises:
      ValueError: if the width is even or below 1, or the kernel is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(tap, 3) for tap in smooth_frequency(jnp.array([1.0, 0.0, 0.0, 0.0]), 3).tolist()]
      [1.91, 0.0, -0.303, 0.0]
    """
    kernel = _odd_window(kernel, width)
    taps, half = kernel.shape[-1], width // 2
    (spectrum,) = rfft(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)), n=taps)
    padded = jnp.pad(spectrum, ((0, 0),) * (kernel.ndim - 1) + ((half, half),))
    frequencies = spectrum.shape[-1]
    shifts = (math.exp(-((i - half) ** 2) / 2) * padded[..., i : i + frequencies] for i in range(width))
    (smoothed,) = irfft(sum(shifts, start=jnp.zeros_like(spectrum)), n=taps)
    return smoothed.astype(kernel.dtype)


@checked_by_hand
def kernel_dropout(
    kernel: Annotated[ArrayLike, "*C D K"],
    rate: float,
    key: PRNGKeyArray | None = None,
    *,
    deterministic: bool = False,
) -> Float[Array, "..."]:
    r"""Sets each tap to zero with probability ``rate`` and scales the others by ``1 / (1 - rate)``.

    One mask serves the whole batch, since the batch shares the kernel. Keeps the kernel's dtype.

    Args:
      kernel: of any shape. Array-likes are accepted.
      rate: 0 <= rate < 1.
      key: random key; needed unless ``deterministic`` or the rate is 0.
      deterministic: returns the kernel as it is.

    Raises:
      ValueError: if the rate is out of range, the key is missing, or the kernel is not of real floats.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> dropped = kernel_dropout(jnp.ones((2, 8)), 0.5, jax.random.key(0))
      >>> sorted(set(dropped.ravel().tolist()))
      [0.0, 2.0]
    """
    kernel = floating("kernel", kernel)
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1); got {rate}.")
    if deterministic or rate == 0:
        return kernel
    if key is None:
        raise ValueError(f"key must be a random key where rate = {rate} and deterministic is False; got None.")
    keep = jax.random.bernoulli(key, 1 - rate, kernel.shape)
    return jnp.where(keep, kernel / (1 - rate), jnp.zeros_like(kernel))


def _odd_window(kernel: Any, width: Any) -> Array:
    """The kernel as an array, if a window of this width has a middle and the kernel an axis to slide along."""
    if not isinstance(width, int) or width < 1 or width % 2 == 0:
        raise ValueError(f"width must be an odd integer >= 1; got {width!r}.")
    array = floating("kernel", kernel)
    if array.ndim < 1 or array.shape[-1] < 1:
        raise ValueError(f"kernel must have shape (..., K) with K >= 1; got shape {array.shape}.")
    return array
