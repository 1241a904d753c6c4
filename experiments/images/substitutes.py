"""What small runs take in place of CIFAR-10, which has to be downloaded: images of the same size in ten classes.

What a model reaches on them says nothing about CIFAR-10.
"""

import numpy as np
from sklearn.datasets import load_digits

from experiments.common.splits import Splits
from experiments.digits.data import upsample
from experiments.images.cifar import stand_in
from experiments.images.cifar.dataset import Form, formed
from experiments.images.cifar.published import SIDE, Images

DIGIT_ROWS = {"train": 1197, "validation": 200, "test": 400}


def digits(form: Form) -> Splits:
    """The handwritten digits that ship inside scikit-learn, gray, 1,197, 200 and 400 of them, the same on every call.

    >>> train, validation, test = digits("rgb")
    >>> len(train), train[0]["inputs"].shape, train[0]["inputs"].dtype
    (1197, (1024, 3), dtype('uint8'))
    """
    loaded = load_digits()
    gray = upsample(loaded.images.astype(np.float32), SIDE) * (255 / 16)
    pixels = np.repeat(gray.round().astype(np.uint8)[..., None], 3, axis=-1)
    labels = loaded.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    ends = np.cumsum(list(DIGIT_ROWS.values()))
    parts = np.split(order[: ends[-1]], ends[:-1])
    return Splits(*(formed(form, Images(pixels[rows], labels[rows])) for rows in parts))


def stripes(form: Form, rows: tuple[int, int, int]) -> Splits:
    """Coloured stripes under noise, whose direction is their class, as many as asked for.

    >>> [len(split) for split in stripes("gray", (12, 10, 8))]
    [12, 10, 8]
    """
    return Splits(*(formed(form, stand_in.draw(count, seed)) for seed, count in enumerate(rows)))
