"""Checks of arguments, one sentence each: the argument, what was expected, what came."""

import operator
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flashbutterfly_jax.typing import ArrayLike


def check_positive(name: str, value) -> None:
    """Refuses whatever is not an integer of at least 1."""
    try:
        valid = operator.index(value) >= 1
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}.")


def check_rate(name: str, value) -> None:
    """Refuses whatever is not a probability below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1); got {value!r}.")


def check_choice(name: str, value, choices: Sequence[str]) -> None:
    """Refuses whatever is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}; got {value!r}.")


def as_sequence(x: ArrayLike, features: int, *, name: str = "features") -> Float[Array, "*B L D"]:
    """The sequence as an array. Refuses whatever is not a real floating-point ``(*B, L, features)``."""
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"x must have a real floating-point dtype; got {array.dtype}.")
    if array.ndim < 2 or array.shape[-1] != features:
        raise ValueError(f"x must have shape (*B, L, {features}), the last axis being {name}; got shape {array.shape}.")
    return array


def as_lengths(lengths: ArrayLike, batch: tuple[int, ...]) -> Int[Array, "*B"]:
    """The lengths as an array. Refuses whatever is not one integer for each sequence of the batch."""
    array = jnp.asarray(lengths)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape != batch:
        raise ValueError(
            f"lengths must be integers of shape {batch}, one for each sequence of x; "
            f"got {array.dtype} of shape {array.shape}."
        )
    return array


def resolve_deterministic(at_call: bool | None, at_construction: bool | None, *, matters: bool) -> bool:
    """Whether this call evaluates (True) or trains: the call decides, then the constructor.

    Where nothing differs between the two, nobody has to say.
    """
    deterministic = at_construction if at_call is None else at_call
    if deterministic is None:
        if matters:
            raise ValueError(
                "deterministic must be True (evaluation) or False (training), in the constructor or at the call, "
                "where there is dropout or batch normalisation; got None."
            )
        return True
    return deterministic
