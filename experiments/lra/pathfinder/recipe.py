"""The options of Pathfinder in its three sizes, and the sets of them that `experiments.lra.train` knows by name."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import grain
import jax
from flax import linen as nn
from rich.console import Console

import flashbutterfly_jax as fb
from experiments.common.classifier import ClassifierRecipe
from experiments.common.splits import Splits
from experiments.common.task import SMOKE_SCHEDULE, Batch, Task
from experiments.lra.pathfinder import dataset, released
from experiments.lra.pathfinder.design import Design, Difficulty


@dataclass(frozen=True, kw_only=True)
class Pathfinder(ClassifierRecipe):
    """Pathfinder of Long Range Arena: whether two discs of an image lie on one dashed curve, read pixel by pixel.

    Images of 32 × 32 pixels are Pathfinder, of 128 × 128 Path-X, of 256 × 256 Path256. The presets `paper` of the first
    two have the released settings of the long convolutions' authors: 200 epochs of 160,000 images on one GPU, where
    94 % of the test images is what the paper is remembered to state, unconfirmed, and 50 epochs, 96.9 % (second-hand).
    Those of Path256, where it reports 92.2 % (second-hand), are not published: its preset is ours. The presets `small`
    take minutes on two CPU cores, with images of 32 × 32 pixels whose curves are short and alone; chance gets 50 %.
    `smoke` takes seconds and learns nothing.
    """

    steps: int = 500_000
    batch_size: int = 64
    learning_rate: float = 0.004
    kernel_learning_rate: float | None = 0.001
    weight_decay: float = 0.03
    warmup_steps: int = 2500
    decay_steps: int | None = 500_000
    log_every: int = 50
    evaluate_every: int = 2500
    checkpoint_every: int = 2500

    bidirectional: bool = True
    prenorm: bool = True
    squash_threshold: float = 0.001
    kernel_dropout_rate: float = 0.3

    decoder: Literal["last", "mean"] = "last"
    """What is classified: the last pixel's features, or the mean over all."""

    side: Literal[32, 128, 256] = 32
    """Of the square images, in pixels."""

    difficulty: Difficulty = "curv_contour_length_14"
    """Curves of 6 (curv_baseline), 9 or 14 dashes."""

    distractors: int | None = None
    """Other curves in each image; None is the published number."""

    data_dir: Path | None = Path("data")
    """Folder of the generated images, drawn if missing. None draws them into memory, in each start."""

    release: Path | None = None
    """Long Range Arena's lra_release.gz, or the folder with pathfinder32 in it, to read instead of drawing images."""

    workers: int = 1
    """Processes that draw images. The images do not depend on it."""

    data_seed: int = 0
    """Of the drawing of images."""

    train_rows: int = 160_000
    """Images to draw for training."""

    validation_rows: int = 20_000
    """Images to draw for choosing the step to test."""

    test_rows: int = 20_000
    """Images to draw for testing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("workers", "train_rows", "validation_rows", "test_rows"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        stored = self.release is None or self.data_dir is not None
        self.require("data_dir", stored, "a folder, to which the released images are written once")
        for name in ("data_seed", "distractors"):
            self.require(name, (getattr(self, name) or 0) >= 0, "at least 0")

    @property
    def whereabouts(self) -> tuple[str, ...]:
        """The images are the same from any folder and any number of workers."""
        return *super().whereabouts, "data_dir", "workers"

    def generated(self) -> dataset.Generated:
        """The images to draw."""
        design = Design(self.side, self.difficulty, self.distractors)
        return dataset.Generated(design, self.data_seed, self.train_rows, self.validation_rows, self.test_rows)

    def load(self) -> Splits:
        """The images, from the place that the options name."""
        console = Console(stderr=True)
        if self.release is not None and self.data_dir is not None:
            return released.splits(self.release, self.side, self.difficulty, data_dir=self.data_dir, console=console)
        return dataset.splits(self.generated(), data_dir=self.data_dir, workers=self.workers, console=console)

    def build(self) -> Task:
        train, validation, test = (grain.MapDataset.source(split) for split in self.load())
        return Task(
            self.model(),
            train=train.seed(self.seed).shuffle(),
            evaluation={"validation": validation, "test": test},
            forward=forward,
        )

    def model(self) -> fb.linen.SequenceClassifier:
        """Residual layers over the pixels, the last one or their mean, and a linear layer."""
        return self.classifier(num_classes=2, kernel_length=self.side**2, decoder=self.decoder)


def forward(model: nn.Module, batch: Batch, deterministic: bool) -> jax.Array:
    """The logits of a batch of bytes."""
    return model(dataset.normalize(batch["inputs"]), deterministic=deterministic)


PAPER = Pathfinder()

PATH_X = Pathfinder(
    side=128,
    batch_size=16,
    learning_rate=0.0005,
    kernel_learning_rate=0.0005,
    weight_decay=0.05,
    warmup_steps=10_000,
    evaluate_every=10_000,
    decoder="mean",
)

# Ours: nothing but the size of the images is published. Path-X's settings, in bfloat16, of which a batch of 16 fits.
PATH_256 = replace(PATH_X, side=256, dtype="bfloat16")

SMALL = Pathfinder(
    steps=600,
    batch_size=32,
    learning_rate=0.01,
    kernel_learning_rate=0.01,
    warmup_steps=50,
    decay_steps=None,
    log_every=20,
    evaluate_every=200,
    checkpoint_every=200,
    num_layers=3,
    features=32,
    channels=1,
    kernel_dropout_rate=0.0,
    decoder="mean",
    difficulty="curv_baseline",
    distractors=0,
    train_rows=20_000,
    validation_rows=1000,
    test_rows=1000,
    data_dir=None,
)


def smoke(recipe: Pathfinder) -> Pathfinder:
    """Too few steps to learn from. Images of 32 × 32 pixels whatever the task, because larger ones take longer."""
    return replace(
        recipe,
        **SMOKE_SCHEDULE,
        num_layers=2,
        features=4,
        side=32,
        train_rows=12,
        validation_rows=6,
        test_rows=6,
        data_dir=None,
    )
