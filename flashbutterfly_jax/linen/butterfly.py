"""Butterflies as Linen modules: over the features, in place of a dense layer or an MLP, and over time as a filter."""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import unfreeze
from jaxtyping import Array, Float

from flashbutterfly_jax.functional import LearnedButterfly, kernel_dropout, learned_long_conv, squash
from flashbutterfly_jax.functional.butterfly import butterfly_linear, init_diagonal, init_linear_blocks, linear_plan
from flashbutterfly_jax.functional.butterfly.stream import init_state, prefill, step
from flashbutterfly_jax.linen.filters import LongFilter
from flashbutterfly_jax.models.checks import check_positive
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Precision


class ButterflyDense(nn.Module):
    r"""A learned butterfly in place of a dense layer over the features.

    .. math:: y = \operatorname{Re} V (s \circ U x) + b

    U and V are butterfly transforms with learned blocks, at first the DFT and its inverse, and s a complex diagonal: at
    first the map is a circular convolution of the features. See `flashbutterfly_jax.functional.butterfly`. For 512
    features it has 6,656 parameters, where a dense layer has 262,656.

    The result has ``dtype``, or what x and the parameters promote to; the products are in float32 at least.

    Parameters: ``diagonal (n, 2)``, ``butterfly_blocks`` with those of ``input`` and ``output``, ``bias (features,)``.

    Attributes:
      features: of the output.
      factors: of the transforms, whose product is at least the number of features on both sides; None chooses.
      per_stage: a block for each stage, not for each size.
      offset_scale: None learns the blocks, a number offsets to fixed ones; see `flashbutterfly_jax.LearnedButterfly`.
      use_bias: adds b.
      kernel_init: of a dense layer whose entries the map's are to resemble at first; None is N(0, 1 / inputs).
      dtype: of the result; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the matrix products.

    Raises:
      ValueError: for a wrong argument.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> layer, x = fb.linen.ButterflyDense(features=512), jnp.ones((2, 512))
      >>> variables = jax.jit(layer.init)(jax.random.key(0), x)
      >>> layer.apply(variables, x).shape, sum(p.size for p in jax.tree.leaves(variables))
      ((2, 512), 6656)
    """

    features: int
    factors: tuple[int, ...] | None = None
    per_stage: bool = True
    offset_scale: float | None = None
    use_bias: bool = True
    kernel_init: Callable | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None

    def __post_init__(self):
        check_positive("features", self.features)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Annotated[ArrayLike, "*B D"]) -> Float[Array, "*B features"]:
        x = jnp.asarray(x)
        inputs = x.shape[-1]
        plan = linear_plan(inputs, self.features, self.factors)
        init = functools.partial(
            init_linear_blocks, per_stage=self.per_stage, offset_scale=self.offset_scale, dtype=self.param_dtype
        )
        blocks = self.param("butterfly_blocks", init, plan)
        diagonal = self.param("diagonal", init_diagonal, (plan.n, 2), inputs, self.kernel_init, self.param_dtype)
        x = x.astype(self.dtype or jnp.result_type(x, diagonal))
        y = butterfly_linear(
            x, diagonal, blocks, self.features, plan=plan, offset_scale=self.offset_scale, precision=self.precision
        )
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(y.dtype)
        return y


class ButterflyMLP(nn.Module):
    """Two `ButterflyDense` layers with GELU, by its tanh, between them: in place of the MLP of a language model.

    Attributes:
      features: of the output.
      hidden_features: between the two.
      dense_init: ``kernel_init`` of the first.
      output_init: of the second.
      factors: of both.
      dtype: of the result; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the matrix products.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> mlp, x = fb.linen.ButterflyMLP(features=4, hidden_features=16), jnp.ones((3, 4))
      >>> mlp.apply(jax.jit(mlp.init)(jax.random.key(0), x), x).shape
      (3, 4)
    """

    features: int
    hidden_features: int
    dense_init: Callable | None = None
    output_init: Callable | None = None
    factors: tuple[int, ...] | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        options: dict[str, Any] = {
            "factors": self.factors,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        hidden = ButterflyDense(self.hidden_features, kernel_init=self.dense_init, **options, name="hidden")(x)
        output = ButterflyDense(self.features, kernel_init=self.output_init, **options, name="output")
        return output(jax.nn.gelu(hidden, approximate=True))


class ButterflyFilter(LongFilter):
    """A `LongFilter` that learns the blocks of its transforms too, in the causal form; steps go on from a cache.

    Parameters: ``kernel (D, K)``, ``skip (D,)``, ``butterfly_blocks`` of `flashbutterfly_jax.LearnedButterfly.init`.

    Attributes:
      butterfly: of the causal form.
      implementation: of `flashbutterfly_jax.learned_long_conv` for whole sequences; `prefill` and `step` are XLA's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flashbutterfly_jax.linen import ButterflyFilter
      >>> module, u = ButterflyFilter(features=4, kernel_length=16), jnp.ones((2, 4, 16))
      >>> module.apply(jax.jit(module.init)(jax.random.key(0), u), u).shape
      (2, 4, 16)
    """

    butterfly: LearnedButterfly = LearnedButterfly()

    def setup(self):
        super().setup()
        arguments = self.features, self.kernel_length, self.param_dtype
        self.butterfly_blocks = self.param("butterfly_blocks", self.butterfly.init, *arguments)

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
        gated = u if pre_gate is None else u * pre_gate
        y = learned_long_conv(
            gated,
            kernel,
            self.skip,
            blocks=self.butterfly_blocks,
            butterfly=self.butterfly,
            implementation=self.implementation,
        )
        return y if post_gate is None else y * post_gate

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int, dtype: DTypeLike) -> Any:
        """The cache before the first step, a `LearnedState`: float32 at least, whatever the dtype."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return init_state(self.butterfly, (*batch_shape, self.features), self.kernel_length, max_length, wide)

    def prefill(self, u: Float[Array, "*B D L"], cache: Any) -> tuple[Float[Array, "*B D L"], Any]:
        """The first steps at once, and the cache after them."""
        return prefill(u, cache, *self._parameters(), butterfly=self.butterfly)

    def step(self, u: Float[Array, "*B D"], cache: Any) -> tuple[Float[Array, "*B D"], Any]:
        """The next step, and the cache after it."""
        return step(u, cache, *self._parameters(), butterfly=self.butterfly)

    def _parameters(self):
        return squash(self.kernel, self.squash_threshold), self.skip, unfreeze(self.butterfly_blocks)
