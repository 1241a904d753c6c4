"""Array arguments of public functions: array-likes become arrays, and what cannot be meant is refused by name."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def floating(name: str, value: Any) -> Float[Array, "..."]:
    """The value as an array of its own real floating-point dtype."""
    if value is None or isinstance(value, str):
        raise ValueError(f"{name} must be an array; got {value!r}.")
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must have a real floating-point dtype; got {array.dtype}.")
    return array
