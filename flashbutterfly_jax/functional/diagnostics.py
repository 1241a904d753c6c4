"""How smooth and how sparse a kernel is, in numbers: what regularisation is for, measured."""

from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from flashbutterfly_jax.functional.arguments import floating
from flashbutterfly_jax.functional.spectral import rfft
from flashbutterfly_jax.typing import ArrayLike, checked_by_hand


@checked_by_hand
def total_variation(kernel: Annotated[ArrayLike, "*C D K"]) -> Float[Array, "..."]:
    r"""How much a kernel moves from tap to tap, in units of its own size.

    .. math:: \frac{\sum_{t=1}^{K-1} |k_t - k_{t-1}|}{\sum_{t=0}^{K-1} |k_t|}

    It does not depend on the kernel's scale. A constant has 0; one bump of N equal taps inside a kernel 2 / N; white
    normal noise :math:`\sqrt 2` on average, for long kernels; alternating signs nearly 2, the most there is. A kernel
    of zeros has 0. Computed in float32, or in float64 for a float64 kernel.

    Args:
      kernel: ``(..., K)``, array-likes accepted.

    Returns:
      A number for each kernel, ``(...)``.

    Raises:
      ValueError: if the kernel is not of real floats, or has no taps.

    Example:
      >>> import jax.numpy as jnp
      >>> total_variation(jnp.array([[2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 0.0, 0.0], [1.0, -1.0, 1.0, -1.0]]))
      Array([0. , 2. , 1.5], dtype=float32)
    """
    kernel = _wide(kernel)
    return _ratio(jnp.abs(jnp.diff(kernel, axis=-1)).sum(-1), jnp.abs(kernel).sum(-1))


@checked_by_hand
def high_frequency_share(kernel: Annotated[ArrayLike, "*C D K"], cutoff: float = 0.5) -> Float[Array, "..."]:
    r"""The share of a kernel's energy at frequencies above a cutoff, as a fraction of the highest there is.

    .. math:: \sum_{2f/N > c} |\hat k_f|^2 \Big/ \sum_f |\hat k_f|^2

    over the N frequencies, positive and negative, of the kernel padded with zeros to N = 2K, as it is for a causal
    convolution. It does not depend on the kernel's scale. A single tap and, on average, white noise have 1 - c, or as
    nearly as N frequencies can; smooth kernels near 0. A kernel of zeros has 0. Dtypes as for `total_variation`.

    Args:
      kernel: ``(..., K)``, array-likes accepted.
      cutoff: c, from 0 to below 1, where 1 is a change of sign from tap to tap.

    Returns:
      A number from 0 to 1 for each kernel, ``(...)``.

    Raises:
      ValueError: if the cutoff is out of range, or the kernel is not of real floats, or has no taps.

    Example:
      >>> import jax.numpy as jnp
      >>> t = jnp.arange(64)
      >>> waves = jnp.stack([jnp.cos(0.1 * jnp.pi * t), jnp.cos(0.9 * jnp.pi * t)])
      >>> [round(share, 2) for share in high_frequency_share(waves).tolist()]
      [0.01, 0.99]
    """
    if not 0 <= cutoff < 1:
        raise ValueError(f"cutoff must be in [0, 1); got {cutoff}.")
    kernel = _wide(kernel)
    n = 2 * kernel.shape[-1]
    (spectrum,) = rfft(kernel, n=n)
    frequency = jnp.arange(n // 2 + 1)
    both_signs = jnp.where((frequency == 0) | (2 * frequency == n), 1, 2)  # f stands for -f too
    energy = both_signs * jnp.square(jnp.abs(spectrum))
    return _ratio(jnp.where(2 * frequency > cutoff * n, energy, 0).sum(-1), energy.sum(-1))


def _wide(kernel: Any) -> Array:
    array = floating("kernel", kernel)
    if array.ndim < 1 or array.shape[-1] < 1:
        raise ValueError(f"kernel must have shape (..., K) with K >= 1; got shape {array.shape}.")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _ratio(part: Array, whole: Array) -> Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)
