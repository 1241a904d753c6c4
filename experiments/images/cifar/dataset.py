"""CIFAR-10 as sequences of gray pixels, of coloured ones, and as a grid.

All 60,000 images lie in memory, one byte for each value: 61 MB in gray, 184 MB in colour. So there is nothing to
prepare but the published archive, from which they are read in two seconds, and a batch is one indexing of numpy.
Numbers become floats on the device, by `normalize`, where four times less has to be copied for it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.common.splits import Splits, random_split
from experiments.images.cifar import published, stand_in
from experiments.images.cifar.published import Images

type Form = Literal["gray", "rgb", "grid"]

TRAIN_ROWS: Final = 45_000
VALIDATION_ROWS: Final = 5_000


class Normalization(NamedTuple):
    """Of each channel, for values from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# Those of the S4 repository and of the long convolutions' authors.
_COLOUR = Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.243, 0.261))
NORMALIZATIONS: Final[dict[Form, Normalization]] = {
    "gray": Normalization(mean=(122.6 / 255,), std=(61.0 / 255,)),
    "rgb": _COLOUR,
    "grid": _COLOUR,
}


@dataclass(frozen=True)
class Split:
    """Images in one form; by its index, one of them as an example for training."""

    inputs: np.ndarray
    """uint8 (rows, 1024, 1) in the form gray, (rows, 1024, 3) in rgb, (rows, 32, 32, 3) as a grid."""

    labels: np.ndarray
    """int32 (rows,), places in `published.CLASSES`."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"inputs": self.inputs[row], "labels": self.labels[row]}


def splits(form: Form, data_dir: Path | None = Path("data"), *, console: Console | None = None) -> Splits:
    """The 45,000 training images, 5,000 validation images and 10,000 test images.

    Validation images are those that the S4 repository and the long convolutions' authors take, which draw them with
    PyTorch and seed 42: see `random_split`.

    Args:
      form: `gray` is a sequence of 1,024 gray pixels, row by row; `rgb` one of coloured pixels; `grid` the image.
      data_dir: the folder of the published archive, or of its unpacked content; it is downloaded if it is missing. See
        `published.read`. None gives 512, 128 and 128 made-up images instead, for tests: see `stand_in`.
      console: for the download's progress.

    Returns:
      Splits for `grain.MapDataset.source`, of examples `{"inputs": uint8, "labels": int32 ()}`. What the shapes of the
      inputs are says `Split`. Give a batch of inputs to `normalize` before the model sees it.

    Raises:
      ValueError: naming the file, if the archive is missing and cannot be downloaded, or is not the published one.

    >>> train, validation, test = splits("rgb", None)
    >>> len(train), train[0]["inputs"].shape, train[0]["inputs"].dtype
    (512, (1024, 3), dtype('uint8'))
    """
    if form not in NORMALIZATIONS:
        raise ValueError(f"form must be gray, rgb or grid; got {form!r}.")
    if data_dir is None:
        return Splits(*(formed(form, stand_in.draw(rows, seed)) for seed, rows in enumerate((512, 128, 128))))
    train, test = published.read(data_dir, console=console)
    return divided(form, train, test, (TRAIN_ROWS, VALIDATION_ROWS))


def divided(form: Form, train: Images, test: Images, sizes: tuple[int, int]) -> Splits:
    """Images in one form, of which so many of the first ones become the training and the validation images."""
    parts = (Images(train.pixels[rows], train.labels[rows]) for rows in random_split(sizes))
    return Splits(*(formed(form, images) for images in (*parts, test)))


def formed(form: Form, images: Images) -> Split:
    """Images as inputs of this form."""
    if form == "grid":
        return Split(images.pixels, images.labels)
    pixels = gray(images.pixels)[..., None] if form == "gray" else images.pixels
    return Split(pixels.reshape(len(pixels), -1, pixels.shape[-1]), images.labels)


def gray(pixels: np.ndarray) -> np.ndarray:
    """The luma of Rec. 601, 0.299 R + 0.587 G + 0.114 B, rounded as Pillow's mode `L` does it.

    >>> gray(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)).tolist()
    [76, 150, 29, 255]
    """
    luma = np.full(pixels.shape[:-1], 1 << 15, np.uint32)
    for channel, weight in enumerate((19595, 38470, 7471)):
        luma += weight * pixels[..., channel].astype(np.uint32)
    return (luma >> 16).astype(np.uint8)


def normalize(inputs: jax.Array, form: Form) -> jax.Array:
    """Inputs of the splits as float32 of mean 0 and standard deviation 1: `(inputs / 255 - mean) / std`.

    For use inside of `jit`, for example in a task's `forward`:

        lambda model, batch, deterministic: model(normalize(batch["inputs"], "gray"), deterministic=deterministic)
    """
    mean, std = (jnp.asarray(values, jnp.float32) for values in NORMALIZATIONS[form])
    return (inputs.astype(jnp.float32) / 255 - mean) / std
