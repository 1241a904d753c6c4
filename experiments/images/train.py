"""Trains classifiers of photographs: `python -m experiments.images.train --help`."""

from experiments.common.command import main
from experiments.common.task import Recipe
from experiments.images.recipe import GRID, RGB, small, smoke

RECIPES: dict[str, dict[str, Recipe]] = {
    "scifar": {"paper": RGB, "small": small(RGB), "smoke": smoke(RGB)},
    "cifar2d": {"paper": GRID, "small": small(GRID), "smoke": smoke(GRID)},
}

if __name__ == "__main__":
    main(RECIPES, prog="python -m experiments.images.train")
