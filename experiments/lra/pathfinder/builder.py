"""Pathfinder as a tensorflow-datasets builder. Imported where data is prepared or read, and only there."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from experiments.common import array_records
from experiments.lra.pathfinder import images


class Pathfinder(array_records.Builder):
    """Images and labels, in the order in which they were drawn or released."""

    VERSION = tfds.core.Version(images.VERSION)
    size: int

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                # zlib: 0.4, 2.1 and 2.7 kB for an image, written and read faster than a PNG. The default encoding
                # makes 66 kB of the largest ones.
                "image": tfds.features.Tensor(shape=(self.size, self.size), dtype=np.uint8, encoding="zlib"),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Do two discs lie on the ends of one dashed curve, or of two?",
            features=features,
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )


# tensorflow-datasets asks for the features while it makes a builder, and pickles it by its class.
class Pathfinder32(Pathfinder):
    """Of 32 × 32 pixels."""

    size = 32


class Pathfinder64(Pathfinder):
    """Of 64 × 64 pixels."""

    size = 64


class Pathfinder128(Pathfinder):
    """Path-X: of 128 × 128 pixels."""

    size = 128


class Pathfinder256(Pathfinder):
    """Path256: of 256 × 256 pixels."""

    size = 256


BUILDERS = {builder.size: builder for builder in (Pathfinder32, Pathfinder64, Pathfinder128, Pathfinder256)}


def make(data_dir: Path, size: int, name: str) -> Pathfinder:
    """The builder of the dataset of this name."""
    return array_records.make(BUILDERS[size], data_dir, name)
