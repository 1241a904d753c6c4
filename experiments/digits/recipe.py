"""The options of the digits experiment, and the model and the data that they describe."""

import functools
from dataclasses import dataclass

import grain
import numpy as np

import flashbutterfly_jax as fb
from experiments.common.task import Recipe, Task
from experiments.digits import data


@dataclass(frozen=True, kw_only=True)
class Digits(Recipe):
    """Train a LongConv classifier on handwritten digits, read as sequences of 1,024 pixels.

    Real data and nothing to download: the digits ship inside scikit-learn. The defaults, eight passes over the 1,397
    training images, reach 98 % of the test images after two to three minutes on two CPU cores; another seed moves that
    by half a percent.
    """

    steps: int = 448
    batch_size: int = 25
    learning_rate: float = 0.02
    kernel_learning_rate: float | None = 0.005
    weight_decay: float = 0.05
    warmup_steps: int = 56
    log_every: int = 14
    evaluate_every: int = 56
    checkpoint_every: int = 56

    shift: int = 2
    """Training images are moved by up to so many of their 32 pixels, at random in each direction."""

    layers: int = 2
    """Residual blocks, each around one long convolution."""

    features: int = 32
    """Width of the model."""

    channels: int = 2
    """Kernels per feature."""

    squash_threshold: float = 0.001
    """Taps below it are zero; the others move towards zero by it."""

    kernel_dropout_rate: float = 0.2
    """Fraction of the taps dropped in each training step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "features", "channels"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("shift", 0 <= self.shift < data.SIDE, f"from 0 to {data.SIDE - 1}")
        self.require("squash_threshold", self.squash_threshold >= 0, "at least 0")
        self.require("kernel_dropout_rate", 0 <= self.kernel_dropout_rate < 1, "from 0 to below 1")

    def build(self) -> Task:
        train, test = (grain.MapDataset.source(data.Examples(split)) for split in data.load())
        shifted = train.seed(self.seed).shuffle().random_map(self._shifted)
        return Task(self.model(), train=shifted, evaluation={"test": test})

    def model(self) -> fb.linen.SequenceClassifier:
        """A stack of residual long convolutions, the mean over the pixels, and a linear layer."""
        layer = functools.partial(
            fb.linen.LongConv,
            channels=self.channels,
            squash_threshold=self.squash_threshold,
            kernel_dropout_rate=self.kernel_dropout_rate,
            implementation=self.implementation,
        )
        return fb.linen.SequenceClassifier(
            num_classes=data.CLASSES,
            features=self.features,
            num_layers=self.layers,
            kernel_length=data.SIDE**2,
            layer=layer,
        )

    def _shifted(self, example: data.Example, rng: np.random.Generator) -> data.Example:
        down, right = rng.integers(-self.shift, self.shift + 1, 2)
        return {**example, "inputs": data.shifted(example["inputs"], down, right)}
