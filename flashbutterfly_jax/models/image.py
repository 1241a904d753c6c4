"""What the Linen and the NNX classifier of images both check, and how they cut an image into patches."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from flashbutterfly_jax.models.checks import check_choice, check_positive, check_rate
from flashbutterfly_jax.models.layer_2d import as_image
from flashbutterfly_jax.models.residual import NORMS, Norm
from flashbutterfly_jax.typing import ArrayLike


@runtime_checkable
class ImageClassifierArguments(Protocol):
    """The constructor arguments that are checked."""

    num_classes: int
    features: int
    num_layers: int
    kernel_size: Sequence[int]
    input_features: int
    patch_size: int
    norm: Norm
    dropout_rate: float


def check_image_classifier(model: ImageClassifierArguments) -> None:
    """Refuses a model that cannot run; its layers check the size of their kernels.

    Raises:
      ValueError: naming the first argument that is wrong.
    """
    for name in ("num_classes", "features", "num_layers", "input_features", "patch_size"):
        check_positive(name, getattr(model, name))
    check_choice("norm", model.norm, NORMS)
    check_rate("dropout_rate", model.dropout_rate)


def patches(model: ImageClassifierArguments, x: ArrayLike) -> Float[Array, "*B H W P"]:
    """The image as a grid of patches, whose pixels, row by row, are the features; of size 1, the image itself.

    Raises:
      ValueError: naming what is wrong with x.
    """
    image, size = as_image(x, model.input_features, name="input_features"), model.patch_size
    *batch, height, width, features = image.shape
    if height % size or width % size:
        raise ValueError(
            f"x must have shape (*B, H, W, {features}) with H and W multiples of patch_size = {size}; "
            f"got shape {image.shape}."
        )
    grid = image.reshape(*batch, height // size, size, width // size, size, features).swapaxes(-4, -3)
    return grid.reshape(*batch, height // size, width // size, size * size * features)
