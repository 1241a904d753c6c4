"""Made-up images in place of CIFAR-10, for tests and for pictures where the archive is not at hand. No photographs."""

import numpy as np

from experiments.images.cifar.published import CLASSES, SIDE, Images


def draw(rows: int, seed: int) -> Images:
    """Coloured stripes, whose direction is their class, under noise.

    >>> draw(4, 0).pixels.shape
    (4, 32, 32, 3)
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), rows, np.int32)
    angle = np.pi * labels[:, None, None] / len(CLASSES)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    phase = rng.uniform(0, 2 * np.pi, (rows, 1, 1))
    wave = np.sin(8 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    colour = rng.uniform(20, 100, (rows, 1, 1, 3))
    values = 128 + wave[..., None] * colour + rng.normal(0, 10, (rows, SIDE, SIDE, 3))
    return Images(values.clip(0, 255).astype(np.uint8), labels)
