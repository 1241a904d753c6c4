"""A task of seconds for the tests of the training loop, with all that the real ones have: the library's classifier,
batch normalisation, two kinds of dropout, padded sequences, augmentation, and splits that no batch size divides.

    python -m tests.experiments.toy --workdir FOLDER
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grain
import numpy as np

import flashbutterfly_jax as fb
from experiments.common.command import main
from experiments.common.task import Recipe, Task, classify

LENGTH = 16
BAD_ROW: int | None = None  # is not a number


class Rows:
    """Noise with a peak: the label is the third of the sequence in which it is."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 3, count).astype(np.int32)
        self.inputs = rng.normal(0, 0.3, (count, LENGTH, 1)).astype(np.float32)
        self.inputs[np.arange(count), 5 * self.labels + rng.integers(0, 5, count)] += 3
        self.lengths = rng.integers(LENGTH - 1, LENGTH + 1, count).astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        inputs = self.inputs[row] * (np.nan if row == BAD_ROW else 1)
        return {"inputs": inputs.astype(np.float32), "labels": self.labels[row], "lengths": self.lengths[row]}


def noisy(example, rng):
    return {**example, "inputs": example["inputs"] + rng.normal(0, 0.1, (LENGTH, 1)).astype(np.float32)}


def counted(model, batch, deterministic):
    """Called in each trace."""
    TRACES.append(deterministic)
    return classify(model, batch, deterministic)


TRACES: list[bool] = []


@dataclass(frozen=True, kw_only=True)
class Toy(Recipe):
    """Finds the peak."""

    steps: int = 30
    batch_size: int = 8
    warmup_steps: int = 4
    learning_rate: float = 0.05
    log_every: int = 3
    evaluate_every: int = 10
    checkpoint_every: int = 6

    features: int = 8
    """Width."""

    norm: Literal["batch", "layer"] = "batch"
    """Of the blocks."""

    dropout_rate: float = 0.1
    """Of activations."""

    def build(self) -> Task:
        layer = functools.partial(
            fb.linen.LongConv, squash_threshold=0.001, kernel_dropout_rate=0.2, implementation=self.implementation
        )
        model = fb.linen.SequenceClassifier(
            num_classes=3,
            features=self.features,
            num_layers=2,
            kernel_length=LENGTH,
            norm=self.norm,
            dropout_rate=self.dropout_rate,
            layer=layer,
        )
        train = grain.MapDataset.source(Rows(101, 1)).seed(self.seed).shuffle().random_map(noisy)
        evaluation = {"validation": Rows(21, 2), "test": Rows(19, 3)}
        sources = {name: grain.MapDataset.source(rows) for name, rows in evaluation.items()}
        return Task(model, train, sources, forward=counted)


RECIPES = {"toy": {"default": Toy(), "wide": Toy(features=16)}, "other": {"default": Toy(seed=1)}}


def rows_of(folder: Path) -> list[dict]:
    """What must not depend on when and on what a run was made."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


if __name__ == "__main__":
    main({"toy": RECIPES["toy"]}, prog="python -m tests.experiments.toy")
