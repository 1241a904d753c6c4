"""What the Linen and the NNX classifier both check."""

from typing import Literal, Protocol, get_args, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from flashbutterfly_jax.models.checks import as_sequence, check_choice, check_positive, check_rate
from flashbutterfly_jax.models.residual import NORMS, Norm
from flashbutterfly_jax.typing import ArrayLike

type Decoder = Literal["mean", "last", "retrieval"]


@runtime_checkable
class ClassifierArguments(Protocol):
    """The constructor arguments that are checked."""

    num_classes: int
    features: int
    num_layers: int
    kernel_length: int
    input_features: int
    vocab_size: int | None
    decoder: Decoder
    norm: Norm
    dropout_rate: float


def check_classifier(model: ClassifierArguments) -> None:
    """Refuses a model that cannot run.

    Raises:
      ValueError: naming the first argument that is wrong.
    """
    for name in ("num_classes", "features", "num_layers", "kernel_length", "input_features"):
        check_positive(name, getattr(model, name))
    if model.vocab_size is not None:
        check_positive("vocab_size", model.vocab_size)
    check_choice("decoder", model.decoder, get_args(Decoder.__value__))
    check_choice("norm", model.norm, NORMS)
    check_rate("dropout_rate", model.dropout_rate)


def as_input(model: ClassifierArguments, x: ArrayLike) -> Shaped[Array, "..."]:
    """The input as an array. Refuses what is neither the pixels nor the tokens that the model was made for.

    Raises:
      ValueError: naming what is wrong with x.
    """
    pixels = model.vocab_size is None
    array = as_sequence(x, model.input_features, name="input_features") if pixels else jnp.asarray(x)
    if not pixels and not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"x must hold integer tokens, since vocab_size = {model.vocab_size}; got {array.dtype}.")
    if array.ndim == 0:
        raise ValueError("x must have shape (*B, L), at least one axis; got shape ().")
    documents = array.shape[: -2 if pixels else -1]
    if model.decoder == "retrieval" and documents[-1:] != (2,):
        wanted = "(*B, 2, L, input_features)" if pixels else "(*B, 2, L)"
        raise ValueError(f"x must have shape {wanted}, two documents for retrieval; got shape {array.shape}.")
    return array
