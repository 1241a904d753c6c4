"""Diagonal state-space models: where their poles start, and the step from continuous to discrete time.

x'(t) = A x(t) + B u(t), y(t) = Re(C x(t)) with a diagonal, complex A is, for steps of length dt over which u is held,

    x_k = exp(dt A) x_{k-1} + (exp(dt A) - 1) / A * B u_k,    y_k = Re(C x_k).

States come in conjugate pairs, of which one is kept and counts twice. The real part of A is kept negative as
-exp(log_decay), so that no update of training can make the model unstable.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from flashbutterfly_jax.typing import DTypeLike

type Poles = Literal["lin", "inv", "legs"]


class NormalHippo(NamedTuple):
    """The normal part of HiPPO-LegS of size N, diagonal: V diag(poles) V*, one of each conjugate pair."""

    poles: Complex[np.ndarray, " P"]
    """N / 2 eigenvalues with positive imaginary parts, which ascend."""

    vectors: Complex[np.ndarray, "N P"]
    """Their unit eigenvectors V."""


def normal_hippo(size: int) -> NormalHippo:
    r"""-1/2 I + S with the skew-symmetric :math:`S_{nk} = \mp \tfrac12 \sqrt{(2n+1)(2k+1)}` for n above and below k.

    The HiPPO-LegS matrix is this plus a matrix of rank one (Gu et al., arXiv 2111.00396, theorem 2).

    Example:
      >>> normal_hippo(4).poles.round(3)
      array([-0.5+0.557j, -0.5+4.603j])
    """
    root = np.sqrt(2 * np.arange(size) + 1)
    skew = 0.5 * np.outer(root, root)
    skew = np.triu(skew, 1) - np.tril(skew, -1)
    frequencies, vectors = np.linalg.eigh(-1j * skew)
    positive = slice(size // 2, size)
    return NormalHippo(-0.5 + 1j * frequencies[positive], vectors[:, positive])


def poles(kind: Poles, size: int) -> Complex[np.ndarray, " P"]:
    r"""The initial A of S4D with N = size states, one of each conjugate pair (Gu et al., arXiv 2206.11893, section 4).

    ``"lin"`` is :math:`-\tfrac12 + i \pi n`, ``"inv"`` is
    :math:`-\tfrac12 + i \tfrac{N}{\pi} \big(\tfrac{N}{2n+1} - 1\big)`, both for n from 0 to N/2 - 1, and ``"legs"``
    the eigenvalues of `normal_hippo`.

    Example:
      >>> poles("lin", 4), poles("inv", 4).round(3)
      (array([-0.5+0.j        , -0.5+3.14159265j]), array([-0.5+3.82j , -0.5+0.424j]))
    """
    n = np.arange(size // 2)
    if kind == "legs":
        return normal_hippo(size).poles
    return -0.5 + 1j * (np.pi * n if kind == "lin" else size / np.pi * (size / (2 * n + 1) - 1))


def log_uniform(low: float, high: float) -> Callable[..., Array]:
    """Initialiser of the logarithms of numbers from low to high, uniform as such: of dt, one for each time scale.

    Example:
      >>> import jax
      >>> bool(jnp.exp(log_uniform(0.001, 0.1)(jax.random.key(0), (64,))).max() <= 0.1)
      True
    """

    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))

    return init


def constant(value: np.ndarray) -> Callable[..., Array]:
    """Initialiser that broadcasts a value to the shape, whatever the key."""

    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        del key
        return jnp.broadcast_to(jnp.asarray(value, dtype), shape)

    return init


def as_complex(pair: Float[Array, "*S 2"]) -> Complex[Array, "*S"]:
    """Real and imaginary parts, stored side by side so that every parameter and its optimiser state are real."""
    return jax.lax.complex(pair[..., 0], pair[..., 1])


def zero_order_hold(
    log_decay: Float[Array, "*S"], frequency: Float[Array, "*S"], log_dt: Float[Array, "*#S"]
) -> tuple[Complex[Array, "*S"], Complex[Array, "*S"]]:
    """The logarithm dt A of the factor of one step, and the weight (exp(dt A) - 1) / A of the input."""
    a = jax.lax.complex(-jnp.exp(log_decay), frequency)
    dt_a = a * jnp.exp(log_dt)
    return dt_a, jnp.expm1(dt_a) / a
