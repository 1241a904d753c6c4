"""S4D: a long convolution whose kernel is the impulse response of a diagonal state-space model."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Complex, Float

from experiments.baselines.output import check_common, gated_output
from experiments.baselines.state_space import Poles, as_complex, constant, log_uniform, poles, zero_order_hold
from flashbutterfly_jax.models import layer
from flashbutterfly_jax.models.checks import check_choice, check_positive, resolve_deterministic
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Implementations, Precision


class S4D(nn.Module):
    r"""S4D (Gu et al. 2022, arXiv 2206.11893) in the place of `flashbutterfly_jax.linen.LongConv`.

    .. math::
        k_l = 2 \operatorname{Re} \sum_n C_n \frac{e^{\Delta A_n} - 1}{A_n} e^{\Delta A_n l}

    for each of the D features, of which each has its own A, C and time step; then what `LongConv` does with its
    kernel: convolution with a skip, exact GELU, dropout, and a gated linear unit over the features. B is one and not
    learned, as only its product with C matters. Bidirectional layers have a second C, which looks ahead, over the
    same A.

    Parameters: ``log_decay``, ``frequency`` (D, N/2) of A, ``log_dt`` (D,), ``C`` (R, D, N/2, 2), ``skip`` (C, D),
    ``output``. Those of A and the time step have the learning rate of long kernels, and no decay, by
    `experiments.baselines.label_kernels`.

    The kernel is computed in ``param_dtype``, whose rounding of phases of dt |A| L radians is the kernel's, too.

    Attributes:
      features: D.
      kernel_length: most taps; the kernel has as many as the sequence where that is shorter.
      channels: C, of the convolution.
      bidirectional: adds C kernels that look ahead.
      state_size: N, even; half of the states are kept.
      init_poles: of A, ``"legs"``, ``"inv"`` or ``"lin"``.
      min_dt: smallest initial time step.
      max_dt: largest.
      dropout_rate: of the dropout before the output projection.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the output projection.
      deterministic: True leaves dropout out. May be given at the call instead.
      implementation: of `flashbutterfly_jax.long_conv`.

    Raises:
      ValueError: at construction for a wrong argument, at the call for a wrong x or lengths.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = S4D(features=8, kernel_length=64, state_size=16)
      >>> x = jnp.ones((2, 64, 8))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 64, 8)
    """

    features: int
    kernel_length: int
    channels: int = 1
    bidirectional: bool = False
    state_size: int = 64
    init_poles: Poles = "legs"
    min_dt: float = 0.001
    max_dt: float = 0.1
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None
    deterministic: bool | None = None
    implementation: Implementations = None

    def __post_init__(self):
        check_common(self)
        check_positive("channels", self.channels)
        check_choice("init_poles", self.init_poles, ("lin", "inv", "legs"))
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
        x = jnp.asarray(x)
        skip = self.param("skip", nn.initializers.normal(1.0), (self.channels, self.features), self.param_dtype)
        h = layer.convolve_channels(
            x,
            self._kernel(min(x.shape[-2], self.kernel_length)),
            skip,
            lengths=lengths,
            dtype=self.dtype,
            implementation=self.implementation,
        )
        return gated_output(self, h, self.channels * self.features, deterministic)

    def _kernel(self, taps: int) -> Float[Array, "R D {taps}"]:
        pairs = self.state_size // 2
        a = poles(self.init_poles, self.state_size)
        states, rows = (self.features, pairs), self.channels * (2 if self.bidirectional else 1)
        log_decay = self.param("log_decay", constant(np.log(-a.real)), states, self.param_dtype)
        frequency = self.param("frequency", constant(a.imag), states, self.param_dtype)
        log_dt = self.param("log_dt", log_uniform(self.min_dt, self.max_dt), states[:1], self.param_dtype)
        c = self.param("C", nn.initializers.normal(math.sqrt(0.5)), (rows, *states, 2), self.param_dtype)
        dt_a, weight = zero_order_hold(log_decay, frequency, log_dt[:, None])
        return impulse_response(dt_a, as_complex(c) * weight, taps)


def impulse_response(dt_a: Complex[Array, "D P"], c: Complex[Array, "R D P"], taps: int) -> Float[Array, "R D {taps}"]:
    r""":math:`2 \operatorname{Re} \sum_p c_p e^{\Delta A_p l}` for l from 0 to taps - 1.

    With l = m i + j the exponential is one of i times one of j, so the sum over the states is a product of matrices
    and no array of states times taps is made: in all 2 sqrt(taps) exponentials of each state.

    Example:
      >>> import jax.numpy as jnp
      >>> impulse_response(jnp.array([[-0.6931472 + 0j]]), jnp.array([[[0.5 + 0j]]]), 4).round(4)
      Array([[[1.   , 0.5  , 0.25 , 0.125]]], dtype=float32)
    """
    fine = math.isqrt(taps - 1) + 1
    coarse = -(-taps // fine)
    outer = c[..., None] * jnp.exp(dt_a[..., None] * (fine * jnp.arange(coarse)))  # (R, D, P, coarse)
    inner = jnp.exp(dt_a[..., None] * jnp.arange(fine))  # (D, P, fine)
    # Re(z w) as one real product, of the doubled number of states.
    left = jnp.concatenate([outer.real, -outer.imag], axis=-2)
    right = jnp.concatenate([inner.real, inner.imag], axis=-2)
    kernel = 2 * jnp.einsum("rdpi,dpj->rdij", left, right, precision=jax.lax.Precision.HIGHEST)
    return kernel.reshape(*kernel.shape[:-2], coarse * fine)[..., :taps]
