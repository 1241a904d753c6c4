"""The causal filters of H3: each feature of a sequence is convolved with its own kernel, however that is stored.

All are called with ``(*B, D, L)``, and go on one step at a time from a cache: `init_cache`, `prefill`, then `step`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from flashbutterfly_jax.functional import kernel_dropout, long_conv, squash
from flashbutterfly_jax.functional.stream import LongConvStream, StreamState, long_conv_stream
from flashbutterfly_jax.initializers import warn_if_mostly_squashed
from flashbutterfly_jax.models import ssm
from flashbutterfly_jax.models.checks import check_positive, check_rate
from flashbutterfly_jax.models.layer import DEFAULT_KERNEL_INIT, DEFAULT_SQUASH_THRESHOLD
from flashbutterfly_jax.typing import DTypeLike, Implementations


class LongCache(NamedTuple):
    """The kernel made ready for steps, for the parameters that made the cache, and what they have seen."""

    stream: LongConvStream
    state: StreamState


class LongFilter(nn.Module):
    r"""A learned kernel as long as the sequence, kept sparse: :math:`y = \mathrm{squash}(k) * u + b \odot u`.

    The kernel stays in ``param_dtype``; the result has the dtype of u. Parameters: ``kernel (D, K)``, ``skip (D,)``.

    Attributes:
      features: D.
      kernel_length: K. Taps beyond the length of the input are not used, and steps further apart do not meet.
      squash_threshold: of `flashbutterfly_jax.squash`; 0 is none.
      kernel_dropout_rate: of `flashbutterfly_jax.kernel_dropout`, in training.
      kernel_init: initialises the kernel.
      param_dtype: of the parameters.
      implementation: of `flashbutterfly_jax.long_conv` for whole sequences; a cache is XLA's, of `long_conv_stream`.

    Raises:
      ValueError: at construction for a wrong argument.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flashbutterfly_jax.linen import LongFilter
      >>> module = LongFilter(features=4, kernel_length=16)
      >>> u = jnp.ones((2, 4, 16))
      >>> module.apply(jax.jit(module.init)(jax.random.key(0), u), u).shape
      (2, 4, 16)
    """

    features: int
    kernel_length: int
    squash_threshold: float = DEFAULT_SQUASH_THRESHOLD
    kernel_dropout_rate: float = 0.0
    kernel_init: Callable = DEFAULT_KERNEL_INIT
    param_dtype: DTypeLike = jnp.float32
    implementation: Implementations = None

    def __post_init__(self):
        check_positive("features", self.features)
        check_positive("kernel_length", self.kernel_length)
        check_rate("kernel_dropout_rate", self.kernel_dropout_rate)
        if not self.squash_threshold >= 0:
            raise ValueError(f"squash_threshold must be >= 0; got {self.squash_threshold}.")
        super().__post_init__()

    def setup(self):
        shape = (self.features, self.kernel_length)
        if self.is_initializing():
            _warn_once(self.kernel_init, self.squash_threshold, shape)
        self.kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        self.skip = self.param("skip", nn.initializers.normal(1.0), (self.features,), self.param_dtype)

    def __call__(
        self,
        u: Float[Array, "*B D L"],
        *,
        pre_gate: Float[Array, "*B D L"] | None = None,
        post_gate: Float[Array, "*B D L"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*B D L"]:
        """``post_gate * filter(pre_gate * u)``."""
        kernel = squash(self.kernel, self.squash_threshold)
        if not deterministic and self.kernel_dropout_rate > 0:
            kernel = kernel_dropout(kernel, self.kernel_dropout_rate, self.make_rng("dropout"))
        return long_conv(
            u, kernel, self.skip, pre_gate=pre_gate, post_gate=post_gate, implementation=self.implementation
        )

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int, dtype: DTypeLike) -> LongCache:
        """The cache before the first step: float32 at least, whatever the dtype."""
        stream = long_conv_stream(squash(self.kernel, self.squash_threshold), self.skip, max_length=max_length)
        return LongCache(stream, stream.init(batch_shape))

    def prefill(self, u: Float[Array, "*B D L"], cache: LongCache) -> tuple[Float[Array, "*B D L"], LongCache]:
        """The first steps by one convolution, and the cache after them."""
        state, y = cache.stream.prefill(u)
        return y, LongCache(cache.stream, state)

    def step(self, u: Float[Array, "*B D"], cache: LongCache) -> tuple[Float[Array, "*B D"], LongCache]:
        """The next step, and the cache after it, for O(log^2 K) operations on average."""
        state, y = cache.stream.step(cache.state, u)
        return y, LongCache(cache.stream, state)


@functools.cache
def _warn_once(init, threshold, shape):
    warn_if_mostly_squashed(init, threshold, shape)


class ShiftCache(NamedTuple):
    """The latest inputs, newest first."""

    inputs: Float[Array, "*B D N"]


class ShiftFilter(nn.Module):
    r"""H3's shift state-space model: a short kernel of ``state_size`` taps, :math:`k_t = \sum_n b_n c_{n+t}`.

    The kernel is convolved by FFTs like a long one: on two CPU cores, products with blocks of its Toeplitz matrix took
    0.65 to 1.08 of the time forwards and 1.4 to 1.9 times as long with the gradient (float32, 4 sequences of 128
    features, 64 taps, L = 1,024 and 4,096, the best of three blocks), and 256 taps 2.4 and 7 times as long.

    Parameters: ``input (D, N)``, ``output (D, N)``, ``skip (D,)``.

    Attributes:
      features: D.
      state_size: N, at most 256.
      param_dtype: of the parameters.
      implementation: of `flashbutterfly_jax.long_conv`.

    Raises:
      ValueError: at construction for a wrong argument.
    """

    features: int
    state_size: int = 64
    param_dtype: DTypeLike = jnp.float32
    implementation: Implementations = None

    def __post_init__(self):
        check_positive("features", self.features)
        check_positive("state_size", self.state_size)
        if self.state_size > 256:
            raise ValueError(f"state_size of a shift filter must be at most 256 taps; got {self.state_size}.")
        super().__post_init__()

    def setup(self):
        shape = (self.features, self.state_size)
        self.input = self.param("input", _first_unit_vector, shape, self.param_dtype)
        self.output = self.param("output", _uniform(self.state_size**-0.5), shape, self.param_dtype)
        self.skip = self.param("skip", nn.initializers.normal(1.0), (self.features,), self.param_dtype)

    def __call__(
        self,
        u: Float[Array, "*B D L"],
        *,
        pre_gate: Float[Array, "*B D L"] | None = None,
        post_gate: Float[Array, "*B D L"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*B D L"]:
        """``post_gate * filter(pre_gate * u)``; nothing differs in training."""
        kernel = ssm.shift_kernel(self.input, self.output)
        return long_conv(
            u, kernel, self.skip, pre_gate=pre_gate, post_gate=post_gate, implementation=self.implementation
        )

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int, dtype: DTypeLike) -> ShiftCache:
        """The cache before the first step; what it holds does not grow with ``max_length``."""
        return ShiftCache(jnp.zeros((*batch_shape, self.features, self.state_size), dtype))

    def prefill(self, u: Float[Array, "*B D L"], cache: ShiftCache) -> tuple[Float[Array, "*B D L"], ShiftCache]:
        """The first steps, and the cache after them."""
        newest = jnp.flip(u[..., -self.state_size :], -1).astype(cache.inputs.dtype)
        return self(u), ShiftCache(jnp.concatenate([newest, cache.inputs], -1)[..., : self.state_size])

    def step(self, u: Float[Array, "*B D"], cache: ShiftCache) -> tuple[Float[Array, "*B D"], ShiftCache]:
        """The next step, and the cache after it, for `state_size` operations."""
        inputs = jnp.concatenate([u[..., None].astype(cache.inputs.dtype), cache.inputs[..., :-1]], -1)
        y = (ssm.shift_kernel(self.input, self.output) * inputs).sum(-1) + self.skip * u
        return y.astype(u.dtype), ShiftCache(inputs)


class DiagonalCache(NamedTuple):
    """The state of the recurrence."""

    state: Complex[Array, "*B D N"]


class DiagonalFilter(nn.Module):
    r"""H3's diagonal state-space model (S4D-Lin): a kernel of any length from ``state_size`` decaying oscillations.

    It starts from :math:`A_n = -1/2 + i \pi n`, B = 1, normal C, and steps from 0.001 to 0.1, by the bilinear
    discretisation. Parameters, with complex numbers as pairs and N = state_size / 2 for conjugate pairs: ``log_decay
    (D, N)``, ``frequency (D, N)``, ``log_step (D,)``, ``input (D, N, 2)``, ``output (D, N, 2)``, ``skip (D,)``.

    Attributes:
      features: D.
      state_size: 2N, even.
      param_dtype: of the parameters.
      implementation: of `flashbutterfly_jax.long_conv`.

    Raises:
      ValueError: at construction for a wrong argument.
    """

    features: int
    state_size: int = 64
    param_dtype: DTypeLike = jnp.float32
    implementation: Implementations = None

    def __post_init__(self):
        check_positive("features", self.features)
        check_positive("state_size", self.state_size)
        if self.state_size % 2:
            raise ValueError(f"state_size of a diagonal filter must be even; got {self.state_size}.")
        super().__post_init__()

    def setup(self):
        shape = (self.features, self.state_size // 2)
        pairs = (*shape, 2)

        def parameter(name: str, init: Callable, shape: tuple[int, ...]) -> Array:
            return self.param(name, init, shape, self.param_dtype)

        self.log_decay = parameter("log_decay", nn.initializers.constant(jnp.log(0.5)), shape)
        self.frequency = parameter("frequency", _multiples_of_pi, shape)
        self.log_step = parameter("log_step", _log_uniform(0.001, 0.1), shape[:1])
        self.input = parameter("input", _ones_of_pairs, pairs)
        self.output = parameter("output", nn.initializers.normal(0.5**0.5), pairs)
        self.skip = parameter("skip", nn.initializers.normal(1.0), shape[:1])

    def __call__(
        self,
        u: Float[Array, "*B D L"],
        *,
        pre_gate: Float[Array, "*B D L"] | None = None,
        post_gate: Float[Array, "*B D L"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*B D L"]:
        """``post_gate * filter(pre_gate * u)``; nothing differs in training."""
        kernel = ssm.diagonal_kernel(self._ssm(), u.shape[-1])
        return long_conv(
            u, kernel, self.skip, pre_gate=pre_gate, post_gate=post_gate, implementation=self.implementation
        )

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int, dtype: DTypeLike) -> DiagonalCache:
        """The cache before the first step: complex whatever the dtype, and no larger for a larger ``max_length``."""
        shape = (*batch_shape, self.features, self.state_size // 2)
        return DiagonalCache(jnp.zeros(shape, jnp.promote_types(self.param_dtype, jnp.complex64)))

    def prefill(self, u: Float[Array, "*B D L"], cache: DiagonalCache) -> tuple[Float[Array, "*B D L"], DiagonalCache]:
        """The first steps by one convolution, and the cache after them."""
        return self(u), DiagonalCache(ssm.diagonal_state(self._ssm(), u))

    def step(self, u: Float[Array, "*B D"], cache: DiagonalCache) -> tuple[Float[Array, "*B D"], DiagonalCache]:
        """The next step by the recurrence, and the cache after it."""
        y, state = ssm.diagonal_step(self._ssm(), u.astype(self.param_dtype), cache.state)
        return (y + self.skip * u).astype(u.dtype), DiagonalCache(state)

    def _ssm(self) -> ssm.Diagonal:
        return ssm.discretize(self.log_decay, self.frequency, self.log_step, self.input, self.output)


def _first_unit_vector(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.zeros(shape, dtype).at[:, 0].set(1)


def _ones_of_pairs(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.zeros(shape, dtype).at[..., 0].set(1)


def _multiples_of_pi(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.broadcast_to(jnp.pi * jnp.arange(shape[-1], dtype=dtype), shape)


def _uniform(bound: float) -> Callable:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _log_uniform(low: float, high: float) -> Callable:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, jnp.log(low), jnp.log(high))
