"""Trains classifiers of photographs: `python -m experiments.images.train --help`."""

from experiments.common.command import main
from experiments.common.task import Recipe
from experiments.images.recipe import RGB, small, smoke

RECIPES: dict[str, dict[str, Recipe]] = {
    "scifar": {"paper": RGB, "small": small(RGB), "smoke": smoke(RGB)},
}

if __name__ == "__main__":
    main(RECIPES, prog="python -m experiments.images.train")
