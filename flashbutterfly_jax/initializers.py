"""Initialisers of long kernels, which know how large their taps are.

Each is called as Flax calls initialisers, ``init(key, shape, dtype)``, with a shape that ends in ``(D, K)``.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.special import erfc

from flashbutterfly_jax.typing import DTypeLike, checked_by_hand


@runtime_checkable
class ScaledInitializer(Protocol):
    """An initialiser of independent, centred normal taps whose standard deviations are known."""

    def __call__(self, key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = ...) -> Float[Array, "..."]:
        """A kernel of this shape."""
        ...

    def tap_scale(self, shape: Sequence[int]) -> Float[np.ndarray, "#D #K"]:
        """The standard deviation of each tap."""
        ...


@dataclasses.dataclass(frozen=True)
class random:
    """Independent normal taps of one standard deviation: ``scale * N(0, 1)``, the paper code's default.

    Example:
      >>> import jax
      >>> from flashbutterfly_jax.initializers import random
      >>> random()(jax.random.key(0), (1, 4, 16)).shape
      (1, 4, 16)
    """

    scale: float = 0.002

    def __call__(
        self, key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "*C D K"]:
        """A kernel of this shape."""
        _taps(shape)
        return jnp.asarray(self.scale, dtype) * jax.random.normal(key, shape, dtype)

    def tap_scale(self, shape: Sequence[int]) -> Float[np.ndarray, "#D #K"]:
        """The standard deviation of each tap."""
        _taps(shape)
        return np.full((1, 1), self.scale)


@dataclasses.dataclass(frozen=True)
class geometric_decay:
    r"""Normal taps that decay exponentially, at rates that grow geometrically with the feature.

    .. math:: k_{d,j} = \mathrm{scale} \cdot N(0, 1) \cdot \exp\!\big(-\tfrac{j}{K} \lfloor D/2 \rfloor^{d/D}\big)

    as in the paper's code (there named ``double_exp``): feature 0 ends at 1/e of its start, the last of D = 256
    is gone after 1 % of the taps.

    Example:
      >>> import jax
      >>> from flashbutterfly_jax.initializers import geometric_decay
      >>> geometric_decay()(jax.random.key(0), (1, 4, 16)).shape
      (1, 4, 16)
    """

    scale: float = 0.02

    def __call__(
        self, key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "*C D K"]:
        """A kernel of this shape."""
        return jnp.asarray(self.tap_scale(shape), dtype) * jax.random.normal(key, shape, dtype)

    def tap_scale(self, shape: Sequence[int]) -> Float[np.ndarray, "D K"]:
        """The standard deviation of each tap."""
        features, taps = _taps(shape)
        rates = float(features // 2) ** (np.arange(features) / features)
        return self.scale * np.exp(-rates[:, None] * np.arange(taps) / taps)


@dataclasses.dataclass(frozen=True)
class geometric_decay_2d:
    r"""`geometric_decay` for a quadrant of an image's kernel: along both axes, away from the pixel.

    .. math:: k_{d,i,j} = \mathrm{scale} \cdot N(0, 1) \cdot
        \exp\!\big(-(\tfrac{i}{K_h} + \tfrac{j}{K_w}) \lfloor D/2 \rfloor^{d/D}\big)

    Ours: the authors released none for images. As it has no ``tap_scale``, a squash that kills its taps draws no
    warning.

    Example:
      >>> import jax
      >>> from flashbutterfly_jax.initializers import geometric_decay_2d
      >>> geometric_decay_2d()(jax.random.key(0), (4, 8, 16, 12)).shape
      (4, 8, 16, 12)
    """

    scale: float = 0.02

    def __call__(
        self, key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "*R D Kh Kw"]:
        """A kernel of this shape, which ends in ``(D, Kh, Kw)``."""
        if len(shape) < 3:
            raise ValueError(f"shape must end in (D, Kh, Kw), at least three axes; got {tuple(shape)}.")
        features, height, width = shape[-3:]
        along_height = geometric_decay(self.scale).tap_scale((features, height))[:, :, None]
        along_width = geometric_decay(1.0).tap_scale((features, width))[:, None, :]
        return jnp.asarray(along_height * along_width, dtype) * jax.random.normal(key, shape, dtype)


@checked_by_hand
def alive_fraction(init: ScaledInitializer, threshold: float, shape: Sequence[int], *, smooth_width: int = 1) -> float:
    """The fraction of taps that `flashbutterfly_jax.squash` leaves alive right after initialisation.

    Smoothing before the squash averages independent taps, which makes them smaller.

    Args:
      init: `random`, `geometric_decay`, or whatever else has their ``tap_scale``.
      threshold: of the squash.
      shape: of the kernel, ending in ``(D, K)``.
      smooth_width: of the moving average before the squash; 1 is none.

    Example:
      >>> from flashbutterfly_jax.initializers import alive_fraction, random
      >>> f"{alive_fraction(random(), 0.002, (2, 256, 1024)):.3f}"
      '0.317'
    """
    variance = np.broadcast_to(np.square(init.tap_scale(shape)), _taps(shape))
    if smooth_width > 1:
        total = np.cumsum(np.pad(variance, ((0, 0), (smooth_width // 2 + 1, smooth_width // 2))), axis=-1)
        variance = (total[:, smooth_width:] - total[:, :-smooth_width]) / smooth_width**2
    with np.errstate(divide="ignore"):
        return float(np.mean(erfc(threshold / np.sqrt(2 * variance)))) if threshold > 0 else 1.0


@checked_by_hand
def warn_if_mostly_squashed(
    init: Callable, threshold: float, shape: Sequence[int], *, smooth_width: int = 1, least: float = 0.01
) -> None:
    """Warns if fewer than the ``least`` fraction of taps survive the squash at initialisation.

    Dead taps get no gradient, so a kernel that is dead at initialisation never learns. The paper code's own default,
    a threshold of 0.1 for taps of scale 0.002, does that. An initialiser without ``tap_scale`` is not judged.

    Example:
      >>> import warnings
      >>> from flashbutterfly_jax.initializers import random, warn_if_mostly_squashed
      >>> with warnings.catch_warnings(record=True, action="always") as caught:
      ...     warn_if_mostly_squashed(random(), 0.1, (1, 4, 64))
      >>> len(caught)
      1
    """
    if not isinstance(init, ScaledInitializer):
        return
    alive = alive_fraction(init, threshold, shape, smooth_width=smooth_width)
    if alive < least:
        warnings.warn(
            f"A squash threshold of {threshold} leaves {alive:.2%} of the taps of {init} alive at initialisation "
            f"(kernel shape {tuple(shape)}, smoothing width {smooth_width}), and dead taps never learn: lower the "
            f"threshold or raise the scale.",
            stacklevel=2,
        )


def _taps(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) < 2:
        raise ValueError(f"shape must end in (D, K), at least two axes; got {tuple(shape)}.")
    return shape[-2], shape[-1]
