"""Checks of arguments, one sentence each: the argument, what was expected, what came."""

import operator
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array


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


def check_sequence(x: Array, features: int, *, name: str = "features") -> None:
    """Refuses whatever is not a real floating-point ``(*B, L, features)``."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must have a real floating-point dtype; got {x.dtype}.")
    if x.ndim < 2 or x.shape[-1] != features:
        raise ValueError(f"x must have shape (*B, L, {features}), the last axis being {name}; got shape {x.shape}.")


def check_lengths(lengths: Array, batch: tuple[int, ...]) -> None:
    """Refuses whatever is not one integer for each sequence of the batch."""
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != batch:
        raise ValueError(
            f"lengths must be integers of shape {batch}, one for each sequence of x; "
            f"got {lengths.dtype} of shape {lengths.shape}."
        )


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
