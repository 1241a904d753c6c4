"""The IMDB reviews as a tensorflow-datasets builder. Imported where data is prepared or read, and only there."""

import tensorflow_datasets as tfds

from experiments.common.array_records import Builder
from experiments.lra.text.archive import LABELS, VERSION


class ImdbText(Builder):
    """Reviews as bytes, and whether they praise, with the fields of the builder `imdb_reviews` of the catalog."""

    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=list(LABELS))}
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Reviews of films with a label, of Maas et al. (2011).",
            features=features,
            supervised_keys=("text", "label"),
            disable_shuffling=True,
        )
