"""Handwritten digits as sequences of 1,024 pixels, from the copy that ships inside scikit-learn."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIDE = 32  # images are read row by row: L = SIDE * SIDE
CLASSES = 10
TRAIN_ROWS, TEST_ROWS = 1397, 400


class Split(NamedTuple):
    """Standardised pixels, float32 (rows, 1024, 1), and digits, int32 (rows,)."""

    pixels: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray | slice) -> "Split":
        """The chosen rows alone."""
        return Split(self.pixels[rows], self.labels[rows])


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


def batches(split: Split, batch_size: int, shift: int, rng: np.random.Generator) -> Iterator[Split]:
    """One shuffled pass over randomly shifted images in batches of one shape; a remainder is left for another pass."""
    order = rng.permutation(len(split.labels))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        pixels, labels = split.take(order[start : start + batch_size])
        yield Split(shifted(pixels, rng.integers(-shift, shift + 1, (2, batch_size))), labels)


def shifted(pixels: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Images (rows, 1024, 1) moved by steps (2, rows) down and to the right; borders that come in repeat the edge."""
    images = pixels.reshape(-1, SIDE, SIDE)
    down, right = np.clip(np.arange(SIDE) - steps[..., None], 0, SIDE - 1)
    which = np.arange(len(images))[:, None, None]
    return images[which, down[:, :, None], right[:, None, :]].reshape(pixels.shape)
