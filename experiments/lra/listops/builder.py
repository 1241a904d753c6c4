"""The generated ListOps as a tensorflow-datasets builder. Imported where data is prepared or read, and only there."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from experiments.lra.listops import trees, vocabulary
from experiments.lra.listops.trees import Row


class Listops(tfds.core.GeneratorBasedBuilder):
    """Tokens without padding, and values, in the order in which they were drawn.

    The configuration's name is the dataset's: tensorflow-datasets finds data by it, and by nothing else.
    """

    VERSION = tfds.core.Version(trees.VERSION)
    rows: Mapping[str, Iterable[Row]] | None = None  # of each split, for preparation alone

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

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        assert self.rows is not None, "rows must be set before preparation"
        return {split: self._generate_examples(rows) for split, rows in self.rows.items()}

    def _generate_examples(self, rows: Iterable[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(rows):
            yield number, row._asdict()

    # Both print on standard output, about downloads that there are none of.
    def _log_download_bytes(self) -> None: ...

    def _log_download_done(self) -> None: ...


def make(data_dir: Path, name: str) -> Listops:
    """The builder of the dataset of this name. From here on tensorflow-datasets shows no progress bars."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # no warning that the configuration is not one of a list
    try:
        return Listops(data_dir=data_dir, config=tfds.core.BuilderConfig(name=name))
    finally:
        logging.set_verbosity(verbosity)
