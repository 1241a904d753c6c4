"""The recipes whose steps are timed, and batches of the right shapes with random content."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.common.classifier import ClassifierRecipe
from experiments.images import recipe as images
from experiments.lra.listops import recipe as listops
from experiments.lra.listops import vocabulary
from experiments.lra.pathfinder import recipe as pathfinder
from experiments.lra.retrieval import recipe as retrieval
from experiments.lra.text import recipe as text

# Tokens of safari's vocabulary of the IMDB reviews, which ours is counted from the data.
TEXT_VOCABULARY = 135


@dataclass(frozen=True)
class Case:
    """A preset `paper`, and what its data decide."""

    recipe: ClassifierRecipe

    length: int
    """Steps of a sequence, L."""

    classes: int

    examples: int
    """Of training, in an epoch."""

    vocab_size: int | None = None
    """None is a sequence of pixels."""

    pixel_features: int = 1

    padded: bool = False
    """Whether sequences have lengths of their own."""

    decoder: str = "mean"

    grid: bool = False
    """Whether inputs are square images, and not sequences."""

    def model(self) -> nn.Module:
        """The model of the recipe."""
        if self.grid:
            return self.recipe.model()  # type: ignore[attr-defined]
        inputs: dict[str, Any] = {"input_features": self.pixel_features}
        if self.vocab_size is not None:
            inputs = {"vocab_size": self.vocab_size}
        return self.recipe.classifier(
            num_classes=self.classes, kernel_length=self.length, decoder=self.decoder, **inputs
        )

    def batch(self) -> dict[str, Any]:
        """Inputs, labels and, of padded sequences, lengths between half and the whole length."""
        rng = np.random.default_rng(0)
        shape: tuple[int, ...] = (self.recipe.batch_size,)
        if self.decoder == "retrieval":
            shape = (*shape, 2)
        if self.vocab_size is None:
            pixels = (math.isqrt(self.length),) * 2 if self.grid else (self.length,)
            inputs = rng.uniform(-1, 1, (*shape, *pixels, self.pixel_features)).astype(np.float32)
        else:
            inputs = rng.integers(0, self.vocab_size, (*shape, self.length), np.uint8)
        batch = {"inputs": inputs, "labels": rng.integers(0, self.classes, shape[:1], np.int32)}
        if self.padded:
            batch["lengths"] = rng.integers(self.length // 2, self.length + 1, shape, np.int32)
        return {name: jnp.asarray(array) for name, array in batch.items()}

    def with_options(self, **options: Any) -> "Case":
        """With other options of the recipe."""
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **options))

    def tiny(self) -> "Case":
        """As small as a machine without a GPU wants it, with all that makes the case what it is."""
        small = self.with_options(num_layers=1, features=8, batch_size=2)
        return dataclasses.replace(small, length=64)


def cases() -> Mapping[str, Case]:
    """By the name of the task."""
    gray, rgb = images.GRAY, images.RGB

    def of_paths(recipe: pathfinder.Pathfinder) -> Case:
        return Case(recipe, recipe.side**2, 2, recipe.train_rows, decoder=recipe.decoder)

    return {
        "listops": Case(listops.PAPER, 2048, 10, 96_000, vocab_size=vocabulary.SIZE, padded=True),
        "text": Case(text.PAPER, 4096, 2, 25_000, vocab_size=TEXT_VOCABULARY, padded=True),
        "retrieval": Case(
            retrieval.PAPER,
            retrieval.PAPER.max_length,
            retrieval.CLASSES,
            147_086,
            vocab_size=retrieval.TOKENS[retrieval.PAPER.units].size,
            padded=True,
            decoder="retrieval",
        ),
        "image": Case(gray, 1024, 10, 45_000),
        "pathfinder": of_paths(pathfinder.PAPER),
        "pathx": of_paths(pathfinder.PATH_X),
        "path256": of_paths(pathfinder.PATH_256),
        "scifar": Case(rgb, 1024, 10, 45_000, pixel_features=3),
        "cifar2d": Case(images.GRID, 1024, 10, 45_000, pixel_features=3, grid=True),
    }


LONG_RANGE_ARENA = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
