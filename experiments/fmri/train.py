"""Trains models of brain activity: `python -m experiments.fmri.train --help`."""

from pathlib import Path

from experiments.common.command import main
from experiments.common.task import Recipe
from experiments.common.train import Result
from experiments.fmri import parameters, recipe

RECIPES: dict[str, dict[str, Recipe]] = {
    "prediction": {
        "paper": recipe.PREDICTION_PAPER,
        "small": recipe.PREDICTION_SMALL,
        "smoke": recipe.PREDICTION_SMOKE,
    },
    "decoding": {"paper": recipe.DECODING_PAPER, "small": recipe.DECODING_SMALL, "smoke": recipe.DECODING_SMOKE},
}


def keep(options: Recipe, result: Result, folder: Path) -> None:
    """Adds the parameters to the folder of a run, for `--pretrained` of another."""
    parameters.write(folder, result.state.params)


if __name__ == "__main__":
    main(RECIPES, prog="python -m experiments.fmri.train", finish=keep)
