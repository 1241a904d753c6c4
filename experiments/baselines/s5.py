"""S5: one diagonal state-space model of all features together, run by an associative scan."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from experiments.baselines.output import check_common, gated_output
from experiments.baselines.state_space import as_complex, constant, log_uniform, normal_hippo, zero_order_hold
from flashbutterfly_jax.models.checks import as_sequence, check_positive, resolve_deterministic
from flashbutterfly_jax.models.layer import mask_padding
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Precision


class S5(nn.Module):
    r"""S5 (Smith, Warrington and Linderman 2023, arXiv 2208.04933) in the place of `flashbutterfly_jax.linen.LongConv`.

    .. math::
        x_k = e^{\Delta A} x_{k-1} + \tfrac{e^{\Delta A} - 1}{A} B u_k, \qquad
        y_k = 2 \operatorname{Re}(C x_k) + d \odot u_k

    with dense B and C, so that every state sees every feature; then exact GELU, dropout, and a gated linear unit over
    the features. Bidirectional layers run the same model from the end, too, and C reads both states. A starts as the
    normal part of HiPPO-LegS, in blocks on the diagonal, with B and C in its eigenvectors' basis.

    Two things differ from the authors' code: the real part of A is minus an exponential, so that it stays negative,
    and the gated linear unit is that of the other layers here.

    Parameters: ``log_decay``, ``frequency``, ``log_dt`` (N/2,), ``B`` (N/2, D, 2), ``C`` (N/2 or N, D, 2), ``skip``
    (D,), ``output``. Those of A and B and the time steps have the learning rate of long kernels, and no decay, by
    `experiments.baselines.label_kernels`. The states are computed in ``param_dtype``.

    Attributes:
      features: D.
      kernel_length: not used: a recurrence has no longest sequence. There for models that give it to their layers.
      bidirectional: runs from the end, too.
      state_size: N, even; half of the states are kept.
      num_blocks: of the initial A; each has an even number of states.
      min_dt: smallest initial time step.
      max_dt: largest.
      dropout_rate: of the dropout before the output projection.
      dtype: of the result; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the matrix products.
      deterministic: True leaves dropout out. May be given at the call instead.

    Raises:
      ValueError: at construction for a wrong argument, at the call for a wrong x or lengths.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = S5(features=8, kernel_length=64, state_size=16, num_blocks=2)
      >>> x = jnp.ones((2, 64, 8))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 64, 8)
    """

    features: int
    kernel_length: int
    bidirectional: bool = False
    state_size: int = 64
    num_blocks: int = 4
    min_dt: float = 0.001
    max_dt: float = 0.1
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None
    deterministic: bool | None = None

    def __post_init__(self):
        check_common(self)
        check_positive("num_blocks", self.num_blocks)
        if self.state_size % (2 * self.num_blocks):
            raise ValueError(
                f"state_size must be a multiple of 2 * num_blocks = {2 * self.num_blocks}; got {self.state_size}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Annotated[ArrayLike, "*B L D"],
        *,
        lengths: Annotated[ArrayLike, "*B"] | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*B L D"]:
        deterministic = resolve_deterministic(deterministic, self.deterministic, matters=self.dropout_rate > 0)
        x = mask_padding(as_sequence(x, self.features), lengths)
        u = x.astype(self.param_dtype)

        pairs = self.state_size // 2
        hippo = normal_hippo(self.state_size // self.num_blocks)
        a = np.tile(hippo.poles, self.num_blocks)
        log_decay = self.param("log_decay", constant(np.log(-a.real)), (pairs,), self.param_dtype)
        frequency = self.param("frequency", constant(a.imag), (pairs,), self.param_dtype)
        log_dt = self.param("log_dt", log_uniform(self.min_dt, self.max_dt), (pairs,), self.param_dtype)
        directions = 2 if self.bidirectional else 1
        init_b = in_basis(hippo.vectors.conj().T, self.features)
        init_c = in_basis(hippo.vectors.T, self.state_size)
        b = as_complex(self.param("B", init_b, (pairs, self.features, 2), self.param_dtype))
        c = as_complex(self.param("C", init_c, (directions * pairs, self.features, 2), self.param_dtype))
        skip = self.param("skip", nn.initializers.normal(1.0), (self.features,), self.param_dtype)

        dt_a, weight = zero_order_hold(log_decay, frequency, log_dt)
        inputs = jnp.matmul(u, (weight[:, None] * b).T, precision=self.precision)
        states = linear_recurrence(jnp.exp(dt_a), inputs)
        if self.bidirectional:
            states = jnp.concatenate([states, linear_recurrence(jnp.exp(dt_a), inputs, reverse=True)], axis=-1)
        y = 2 * jnp.matmul(states, c, precision=self.precision).real + skip * u
        h = jax.nn.gelu(y, approximate=False).astype(self.dtype or jnp.result_type(x, self.param_dtype))
        return gated_output(self, h, self.features, deterministic)


def linear_recurrence(
    factors: Complex[Array, " P"], inputs: Complex[Array, "*B L P"], *, reverse: bool = False
) -> Complex[Array, "*B L P"]:
    """x_k = factors * x_{k-1} + inputs_k, or x_{k+1} in reverse, from zero, in O(log L) parallel steps.

    Example:
      >>> import jax.numpy as jnp
      >>> linear_recurrence(jnp.array([0.5 + 0j]), jnp.ones((3, 1), complex)).real.ravel()
      Array([1.  , 1.5 , 1.75], dtype=float32)
    """

    def then(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    by_time = jnp.moveaxis(inputs, -2, 0)
    repeated = jnp.broadcast_to(factors, (by_time.shape[0], *(1,) * (by_time.ndim - 2), factors.size))
    _, states = jax.lax.associative_scan(then, (repeated, by_time), reverse=reverse)
    return jnp.moveaxis(states, 0, -2)


def in_basis(vectors: Complex[np.ndarray, "P N"], fan_in: int) -> Callable[..., Array]:
    """Initialiser (S, D, 2) of real normal numbers of variance 1 / fan_in, each block of N rows mapped to P by vectors.

    The shape has P rows for each block; its last axis holds real and imaginary parts.
    """
    kept, size = vectors.shape

    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        rows, columns, _ = shape
        real = jax.random.normal(key, (rows // kept, size, columns), dtype) / math.sqrt(fan_in)
        parts = (jnp.asarray(part, dtype) for part in (vectors.real, vectors.imag))
        mapped = [jnp.einsum("pn,bnd->bpd", part, real, precision=jax.lax.Precision.HIGHEST) for part in parts]
        return jnp.stack([part.reshape(rows, columns) for part in mapped], axis=-1)

    return init
