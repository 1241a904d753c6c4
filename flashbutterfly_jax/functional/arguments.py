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


def shaped(name: str, value: Any, *shapes: tuple[Any, ...], of: str) -> Float[Array, "..."] | None:
    """The value likewise, of one of the shapes, which are those of something; None is left."""
    if value is None:
        return None
    array = floating(name, value)
    if array.shape not in shapes:
        expected = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must have shape {expected}, that of {of}; got shape {array.shape}.")
    return array
