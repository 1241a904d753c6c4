"""Butterflies over the features as NNX modules: in place of a linear layer, and of an MLP."""

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flashbutterfly_jax.functional.butterfly import butterfly_linear, init_diagonal, init_linear_blocks, linear_plan
from flashbutterfly_jax.models.checks import check_positive
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Precision


class ButterflyDense(nnx.Module):
    """A learned butterfly in place of a linear layer over the features.

    Equations, parameters and arguments are those of `flashbutterfly_jax.linen.ButterflyDense`, and under the same
    parameters so is the result. What differs is NNX's: the number of inputs is said here, and ``rngs`` draws.

    Args:
      in_features: of x.
      features: of the output.
      factors: of the transforms, whose product is at least the number of features on both sides; None chooses.
      per_stage: a block for each stage, not for each size.
      offset_scale: None learns the blocks, a number offsets to fixed ones.
      use_bias: adds b.
      kernel_init: of a dense layer whose entries the map's are to resemble at first; None is N(0, 1 / inputs).
      dtype: of the result; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the matrix products.
      rngs: with the stream ``params``.

    Raises:
      ValueError: for a wrong argument.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flashbutterfly_jax as fb
      >>> fb.nnx.ButterflyDense(512, 128, rngs=nnx.Rngs(0))(jnp.ones((2, 512))).shape
      (2, 128)
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        factors: tuple[int, ...] | None = None,
        per_stage: bool = True,
        offset_scale: float | None = None,
        use_bias: bool = True,
        kernel_init: Callable | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        *,
        rngs: nnx.Rngs,
    ):
        check_positive("in_features", in_features)
        check_positive("features", features)
        self.in_features, self.features, self.offset_scale = in_features, features, offset_scale
        self.dtype, self.precision = dtype, precision
        self.plan = linear_plan(in_features, features, factors)
        blocks = init_linear_blocks(
            rngs.params(), self.plan, per_stage=per_stage, offset_scale=offset_scale, dtype=param_dtype
        )
        self.butterfly_blocks = nnx.data(jax.tree.map(nnx.Param, blocks))
        self.diagonal = nnx.Param(init_diagonal(rngs.params(), (self.plan.n, 2), in_features, kernel_init, param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype)) if use_bias else None

    def __call__(self, x: Annotated[ArrayLike, "*B D"]) -> Float[Array, "*B features"]:
        x, diagonal = jnp.asarray(x), self.diagonal[...]
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must have shape (*B, {self.in_features}); got shape {x.shape}.")
        y = butterfly_linear(
            x.astype(self.dtype or jnp.result_type(x, diagonal)),
            diagonal,
            read(self.butterfly_blocks),
            self.features,
            plan=self.plan,
            offset_scale=self.offset_scale,
            precision=self.precision,
        )
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class ButterflyMLP(nnx.Module):
    """Two `ButterflyDense` layers with GELU, by its tanh, between them.

    Arguments are those of `flashbutterfly_jax.linen.ButterflyMLP`; x has as many features as the result.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flashbutterfly_jax as fb
      >>> fb.nnx.ButterflyMLP(4, 16, rngs=nnx.Rngs(0))(jnp.ones((3, 4))).shape
      (3, 4)
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        dense_init: Callable | None = None,
        output_init: Callable | None = None,
        factors: tuple[int, ...] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        *,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {
            "factors": factors,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "rngs": rngs,
        }
        self.hidden = ButterflyDense(features, hidden_features, kernel_init=dense_init, **options)
        self.output = ButterflyDense(hidden_features, features, kernel_init=output_init, **options)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.output(jax.nn.gelu(self.hidden(x), approximate=True))


def read(variables: Any) -> Any:
    """The arrays of a tree of variables."""
    return jax.tree.map(lambda variable: variable[...], variables, is_leaf=lambda x: isinstance(x, nnx.Variable))
