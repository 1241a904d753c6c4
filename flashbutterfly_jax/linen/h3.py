"""The mixers of H3 as Linen modules: two causal filters and two gates between dense layers."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flashbutterfly_jax.functional import LearnedButterfly
from flashbutterfly_jax.linen.butterfly import ButterflyFilter
from flashbutterfly_jax.linen.filters import DiagonalFilter, LongFilter, ShiftFilter
from flashbutterfly_jax.models.checks import check_positive
from flashbutterfly_jax.models.layer import DEFAULT_KERNEL_INIT, DEFAULT_SQUASH_THRESHOLD
from flashbutterfly_jax.typing import DTypeLike, Implementations, Precision


class FilterCaches(NamedTuple):
    """What the two filters remember."""

    key: Any
    memory: Any


class _Mixer(nn.Module):
    """The flow that both mixers share; a subclass says by `filters` what they convolve with."""

    features: int
    dense_init: Callable = nn.initializers.normal(0.02)
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None
    implementation: Implementations = None

    def filters(self) -> tuple[nn.Module, nn.Module]:
        raise NotImplementedError

    def setup(self):
        dense = functools.partial(
            nn.Dense,
            self.features,
            kernel_init=self.dense_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        self.query, self.key, self.value, self.output = (dense() for _ in range(4))
        self.key_filter, self.memory_filter = self.filters()

    def __call__(self, x: Float[Array, "*B L D"], *, deterministic: bool = True) -> Float[Array, "*B L D"]:
        """The output at every step."""
        query, key, value = (jnp.swapaxes(h, -1, -2) for h in self._project(x))
        key = self.key_filter(key, deterministic=deterministic)
        y = self.memory_filter(key, pre_gate=value, post_gate=query, deterministic=deterministic)
        return self.output(jnp.swapaxes(y, -1, -2))

    def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> FilterCaches:
        """Empty caches for sequences of up to ``max_length`` steps."""
        filters = self.key_filter, self.memory_filter
        return FilterCaches(*(module.init_cache((batch_size,), max_length, dtype) for module in filters))

    def prefill(self, x: Float[Array, "B L D"], cache: FilterCaches) -> tuple[Float[Array, "B L D"], FilterCaches]:
        """The output at the first steps, each filter by one convolution, and the caches after them."""
        query, key, value = (jnp.swapaxes(h, -1, -2) for h in self._project(x))
        key, key_cache = self.key_filter.prefill(key, cache.key)
        y, memory_cache = self.memory_filter.prefill(key * value, cache.memory)
        return self.output(jnp.swapaxes(query * y, -1, -2)), FilterCaches(key_cache, memory_cache)

    def step(self, x: Float[Array, "B D"], cache: FilterCaches) -> tuple[Float[Array, "B D"], FilterCaches]:
        """The output at the next step, and the caches after it."""
        query, key, value = self._project(x)
        key, key_cache = self.key_filter.step(key, cache.key)
        y, memory_cache = self.memory_filter.step(key * value, cache.memory)
        return self.output(query * y), FilterCaches(key_cache, memory_cache)

    def _project(self, x):
        return self.query(x), self.key(x), self.value(x)


class H3LongConv(_Mixer):
    r"""H3 with long convolutions in the place of its state-space models (Fu et al. 2023).

    .. math::
        y = W\,\big(q \odot (\kappa_2 * (k' \odot v))\big), \quad k' = \kappa_1 * k,
        \quad q, k, v = W_q x,\ W_k x,\ W_v x

    where both convolutions are causal, have a skip connection and a squashed kernel for each feature. The two
    products are part of the second convolution. Parameters: dense layers ``query``, ``key``, ``value``, ``output``
    with biases, and the `LongFilter` ``key_filter`` and ``memory_filter``.

    Attributes:
      features: D.
      dense_init: initialises the weights of the dense layers; biases start at 0.
      dtype: of the computation; None promotes x and the parameters. Kernels stay in ``param_dtype``.
      param_dtype: of the parameters.
      precision: of the dense layers.
      implementation: of `flashbutterfly_jax.long_conv`, or with a butterfly of `flashbutterfly_jax.learned_long_conv`.
      kernel_length: K, of both kernels.
      squash_threshold: of `flashbutterfly_jax.squash`; 0 is none.
      kernel_dropout_rate: of `flashbutterfly_jax.kernel_dropout`, in training.
      kernel_init: initialises both kernels.
      butterfly: learns the blocks of both convolutions' transforms as well, in its causal form alone.

    Raises:
      ValueError: at construction for a wrong argument.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> mixer = fb.linen.H3LongConv(features=8, kernel_length=64)
      >>> x = jnp.ones((2, 64, 8))
      >>> mixer.apply(jax.jit(mixer.init)(jax.random.key(0), x), x).shape
      (2, 64, 8)
    """

    kernel_length: int = 2048
    squash_threshold: float = DEFAULT_SQUASH_THRESHOLD
    kernel_dropout_rate: float = 0.0
    kernel_init: Callable = DEFAULT_KERNEL_INIT
    butterfly: LearnedButterfly | None = None

    def __post_init__(self):
        check_positive("features", self.features)
        check_positive("kernel_length", self.kernel_length)
        if self.butterfly is not None and not self.butterfly.causal:
            raise ValueError(
                'butterfly must be of the form "causal", as the others look ahead once trained, at what a language '
                f"model is to predict; got {self.butterfly.form!r}."
            )
        super().__post_init__()

    def filters(self) -> tuple[nn.Module, nn.Module]:
        """Two long convolutions."""
        learned: dict[str, Any] = {} if self.butterfly is None else {"butterfly": self.butterfly}
        make = functools.partial(
            ButterflyFilter if learned else LongFilter,
            self.features,
            self.kernel_length,
            squash_threshold=self.squash_threshold,
            kernel_dropout_rate=self.kernel_dropout_rate,
            kernel_init=self.kernel_init,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
            **learned,
        )
        return make(), make()


class H3(_Mixer):
    """The mixer of H3 itself (Dao et al. 2023): a shift filter on the keys, a diagonal one on keys times values.

    Flow and arguments are those of `H3LongConv`, but for the kernels: `ShiftFilter` and `DiagonalFilter`.

    Attributes:
      features: D.
      dense_init: initialises the weights of the dense layers; biases start at 0.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the dense layers.
      implementation: of `flashbutterfly_jax.long_conv`.
      state_size: of both filters.

    Raises:
      ValueError: at construction for a wrong argument.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> mixer = fb.linen.H3(features=8)
      >>> x = jnp.ones((2, 64, 8))
      >>> mixer.apply(jax.jit(mixer.init)(jax.random.key(0), x), x).shape
      (2, 64, 8)
    """

    state_size: int = 64

    def __post_init__(self):
        check_positive("features", self.features)
        super().__post_init__()

    def filters(self) -> tuple[nn.Module, nn.Module]:
        """One of each kind."""
        arguments: dict[str, Any] = {"param_dtype": self.param_dtype, "implementation": self.implementation}
        return (
            ShiftFilter(self.features, self.state_size, **arguments),
            DiagonalFilter(self.features, self.state_size, **arguments),
        )
