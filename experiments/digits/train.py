"""Trains a LongConv classifier on handwritten digits: `python -m experiments.digits.train --help`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

import flashbutterfly_jax as fb
from experiments.common.command import main
from experiments.common.figures import learning_curves
from experiments.common.train import Result, make_initialization
from experiments.common.workdir import write_whole
from experiments.digits import figures
from experiments.digits.recipe import Digits

RECIPES = {"digits": {"default": Digits()}}
TARGET = 0.97  # of the test images; the defaults stay above it


def draw(recipe: Digits, result: Result, folder: Path) -> None:
    """Adds the pictures to the folder of a run."""
    before = jax.jit(make_initialization(recipe, recipe.build()))()
    stages = [
        stored_and_squashed("at initialisation", before.params, recipe),
        stored_and_squashed("trained", result.state.params, recipe),
    ]
    write_whole(folder / "learning_curves.png", learning_curves(result.rows, TARGET))
    write_whole(folder / "kernels.png", figures.kernels(stages, recipe.squash_threshold))
    write_whole(folder / "spectra.png", figures.spectra(stages))


def stored_and_squashed(when: str, params: Any, recipe: Digits) -> figures.Kernels:
    """The kernels of all layers, as stored and as the convolution uses them."""
    stored = params["blocks"]["layer"]["kernel"]
    return figures.Kernels(when, np.array(stored), np.array(fb.squash(stored, recipe.squash_threshold)))


if __name__ == "__main__":
    main(RECIPES, prog="python -m experiments.digits.train", finish=draw)
