"""Handwritten digits as sequences of 1,024 pixels, from the copy that ships inside scikit-learn."""

from typing import NamedTuple, TypedDict

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIDE = 32  # images are read row by row: L = SIDE * SIDE
CLASSES = 10
TRAIN_ROWS, TEST_ROWS = 1397, 400


class Example(TypedDict):
    """A standardised image, float32 (1024, 1), and its digit, int32 ()."""

    inputs: np.ndarray
    labels: np.ndarray


class Split(NamedTuple):
    """Standardised pixels, float32 (rows, 1024, 1), and digits, int32 (rows,)."""

    pixels: np.ndarray
    labels: np.ndarray


class Examples:
    """The rows of a split one by one."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split.labels)

    def __getitem__(self, row: int) -> Example:
        return {"inputs": self._split.pixels[row], "labels": self._split.labels[row]}


def load() -> tuple[Split, Split]:
    """The training and the test split, stratified by digit, the same ones on every call.

    The 8 x 8 images are upsampled to 32 x 32 bilinearly and standardised by the training pixels' mean and deviation.
    """
    digits = load_digits()
    images = upsample(digits.images.astype(np.float32), SIDE)
    train_pixels, test_pixels, train_labels, test_labels = train_test_split(
        images.reshape(-1, SIDE * SIDE, 1),
        digits.target.astype(np.int32),
        train_size=TRAIN_ROWS,
        test_size=TEST_ROWS,
        stratify=digits.target,
        random_state=0,
    )
    mean, deviation = train_pixels.mean(), train_pixels.std()
    return (
        Split((train_pixels - mean) / deviation, train_labels),
        Split((test_pixels - mean) / deviation, test_labels),
    )


def upsample(images: np.ndarray, side: int) -> np.ndarray:
    """Bilinear interpolation of square images (rows, n, n) to (rows, side, side), pixel centres aligned."""
    n = images.shape[-1]
    positions = (np.arange(side) + 0.5) * n / side - 0.5
    # Row i holds the weights of output i: a triangle of half-width one; positions past the border repeat the edge.
    distance = np.abs(np.clip(positions, 0, n - 1)[:, None] - np.arange(n))
    weights = np.maximum(1 - distance, 0).astype(images.dtype)
    return weights @ images @ weights.T


def shifted(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """An image (1024, 1) moved down and to the right; borders that come in repeat the edge."""
    rows, columns = (np.clip(np.arange(SIDE) - steps, 0, SIDE - 1) for steps in (down, right))
    return pixels.reshape(SIDE, SIDE)[np.ix_(rows, columns)].reshape(pixels.shape)
