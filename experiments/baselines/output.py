"""What the baselines share with each other and with `flashbutterfly_jax.linen.LongConv`."""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from flashbutterfly_jax.models.checks import check_positive, check_rate
from flashbutterfly_jax.models.layer import uniform_fan_in


def check_common(module: Any) -> None:
    """Refuses a layer that cannot run.

    Raises:
      ValueError: naming the first argument that is wrong.
    """
    check_positive("features", module.features)
    check_positive("kernel_length", module.kernel_length)
    check_rate("dropout_rate", module.dropout_rate)
    if hasattr(module, "state_size"):
        check_positive("state_size", module.state_size)
        if module.state_size % 2:
            raise ValueError(f"state_size must be even, for states come in pairs; got {module.state_size}.")
        if not 0 < module.min_dt <= module.max_dt:
            raise ValueError(f"min_dt must be above 0 and at most max_dt = {module.max_dt}; got {module.min_dt}.")


def gated_output(
    module: nn.Module, h: Float[Array, "*B L F"], fan_in: int, deterministic: bool
) -> Float[Array, "*B L D"]:
    """Dropout, then a gated linear unit over the features, named ``output``: that of `LongConv`.

    Called within the compact call of the module, whose submodules they become.
    """
    h = nn.Dropout(module.dropout_rate)(h, deterministic=deterministic)
    return nn.glu(dense(module, fan_in, 2 * module.features, "output")(h))


def dense(module: nn.Module, fan_in: int, features: int, name: str) -> nn.Module:
    """A dense layer with the module's dtypes and precision, and the initialisation of the library's layers."""
    init = uniform_fan_in(fan_in)
    return nn.Dense(
        features,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        precision=module.precision,
        kernel_init=init,
        bias_init=init,
        name=name,
    )
