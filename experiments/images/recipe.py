"""The options of CIFAR-10, and the sets of them that `experiments.lra.train` and `experiments.images.train` know."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import grain
import jax
import jax.numpy as jnp
from flax import linen as nn
from rich.console import Console

import flashbutterfly_jax as fb
from experiments.common.classifier import ClassifierRecipe
from experiments.common.splits import Splits
from experiments.common.task import SMOKE_SCHEDULE, Batch, Task
from experiments.images import substitutes
from experiments.images.cifar import dataset
from experiments.images.cifar.dataset import Form
from experiments.images.cifar.published import CLASSES, SIDE


@dataclass(frozen=True, kw_only=True)
class Cifar(ClassifierRecipe):
    """CIFAR-10 pixel by pixel: the class of a photograph, read as a sequence of 1,024 pixels.

    In gray it is the task Image of Long Range Arena. Its preset `paper` has the released settings of the long
    convolutions' authors, 200 epochs on one GPU, where 88 % of the test images is what the paper is remembered to
    state, unconfirmed. In colour it is sequential CIFAR-10, 300 epochs and 91.0 % (second-hand). As a grid it is seen
    by two-dimensional long convolutions, for which 89.1 % is reported (second-hand) but no settings: they are ours. The
    preset `small` takes minutes on two CPU cores and reads handwritten digits instead, of which chance gets 10 %;
    `smoke` takes seconds, reads stripes and learns nothing.
    """

    steps: int = 180_000
    batch_size: int = 50
    learning_rate: float = 0.01
    kernel_learning_rate: float | None = 0.001
    weight_decay: float = 0.05
    warmup_steps: int = 1000
    decay_steps: int | None = 200_000
    log_every: int = 50
    evaluate_every: int = 900
    checkpoint_every: int = 900

    num_layers: int = 6
    features: int = 512
    norm: Literal["batch", "layer"] = "layer"
    dropout_rate: float = 0.1
    squash_threshold: float = 0.003

    form: Form = "gray"
    """gray and rgb are sequences of pixels, grid is the coloured image."""

    source: Literal["cifar10", "digits", "stripes"] = "cifar10"
    """digits, from scikit-learn, and stripes, which are drawn, need no download and are no CIFAR-10."""

    data_dir: Path = Path("data")
    """Folder of CIFAR-10's archive, which is downloaded if it is missing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "grid":
            self.require("architecture", self.architecture == "long_conv", "long_conv where form is grid")
            self.require("kernel_init", self.kernel_init == "random", "random where form is grid")

    @property
    def whereabouts(self) -> tuple[str, ...]:
        """The images are the same from any folder."""
        return *super().whereabouts, "data_dir"

    def load(self) -> Splits:
        """The images, from where the options say."""
        match self.source:
            case "digits":
                return substitutes.digits(self.form)
            case "stripes":
                return substitutes.stripes(self.form, (64, 32, 32))
        return dataset.splits(self.form, self.data_dir, console=Console(stderr=True))

    def build(self) -> Task:
        train, validation, test = (grain.MapDataset.source(split) for split in self.load())
        return Task(
            self.model(),
            train=train.seed(self.seed).shuffle(),
            evaluation={"validation": validation, "test": test},
            forward=self.forward,
        )

    def forward(self, model: nn.Module, batch: Batch, deterministic: bool) -> jax.Array:
        """The logits of a batch of bytes."""
        return model(dataset.normalize(batch["inputs"], self.form), deterministic=deterministic)

    def model(self) -> nn.Module:
        """Residual layers over the pixels, their mean, and a linear layer."""
        if self.form == "grid":
            return self.grid_model()
        channels = {"gray": 1, "rgb": 3}[self.form]
        return self.classifier(num_classes=len(CLASSES), kernel_length=SIDE**2, input_features=channels)

    def grid_model(self) -> nn.Module:
        """The same with two-dimensional layers, which look to all sides unless causal ones are asked for."""
        layer = functools.partial(
            fb.linen.LongConv2D,
            channels=self.channels,
            causal=(not self.bidirectional,) * 2,
            squash_threshold=self.squash_threshold,
            smooth_width=self.smooth_width,
            kernel_dropout_rate=self.kernel_dropout_rate,
            implementation=self.implementation,
        )
        return fb.linen.ImageClassifier(
            num_classes=len(CLASSES),
            features=self.features,
            num_layers=self.num_layers,
            kernel_size=(SIDE, SIDE),
            layer=layer,
            norm=self.norm,
            prenorm=self.prenorm,
            dropout_rate=self.dropout_rate,
            dtype=jnp.dtype(self.dtype),
        )


GRAY = Cifar()

# The released settings of sequential CIFAR-10 in colour differ in the threshold and in the number of epochs.
RGB = Cifar(form="rgb", squash_threshold=0.001, steps=270_000, decay_steps=300_000)


# Ours: the settings of the sequential task, with kernels that look to all sides.
GRID = replace(RGB, form="grid", bidirectional=True)


def small(recipe: Cifar) -> Cifar:
    """Handwritten digits and a model for two CPU cores, whose kernels learn ten times as fast as the paper's."""
    return replace(
        recipe,
        steps=300,
        batch_size=25,
        learning_rate=0.02,
        kernel_learning_rate=0.01,
        warmup_steps=30,
        decay_steps=None,
        log_every=10,
        evaluate_every=100,
        checkpoint_every=100,
        num_layers=2,
        features=32,
        dropout_rate=0.0,
        squash_threshold=0.001,
        source="digits",
    )


def smoke(recipe: Cifar) -> Cifar:
    """Too few steps to learn from, on stripes."""
    return replace(
        recipe,
        **SMOKE_SCHEDULE,
        num_layers=2,
        features=4,
        source="stripes",
    )
