"""The generated ListOps as a tensorflow-datasets builder. Imported where data is prepared or read, and only there."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from experiments.common import array_records
from experiments.lra.listops import trees, vocabulary


class Listops(array_records.Builder):
    """Tokens without padding, and values, in the order in which they were drawn."""

    VERSION = tfds.core.Version(trees.VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                # Bytes: the default encoding reads 30 times slower. Not Sequence, which reads into lists.
                "tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),
                "value": tfds.features.ClassLabel(num_classes=vocabulary.DIGITS),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Nested lists of digits under MIN, MAX, MED and SM, drawn by the rules of Long Range Arena.",
            features=features,
            supervised_keys=("tokens", "value"),
            disable_shuffling=True,
        )


def make(data_dir: Path, name: str) -> Listops:
    """The builder of the dataset of this name."""
    return array_records.make(Listops, data_dir, name)
