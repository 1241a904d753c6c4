"""Trains the models of Long Range Arena: `python -m experiments.lra.train --help`."""

from experiments.common.command import main
from experiments.common.task import Recipe
from experiments.images import recipe as images
from experiments.lra.listops import recipe as listops
from experiments.lra.pathfinder import recipe as pathfinder
from experiments.lra.retrieval import recipe as retrieval
from experiments.lra.text import recipe as text

RECIPES: dict[str, dict[str, Recipe]] = {
    "listops": {"paper": listops.PAPER, "small": listops.SMALL, "smoke": listops.SMOKE},
    "text": {"paper": text.PAPER, "small": text.SMALL, "smoke": text.SMOKE},
    "retrieval": {"paper": retrieval.PAPER, "small": retrieval.SMALL, "smoke": retrieval.SMOKE},
    "image": {"paper": images.GRAY, "small": images.small(images.GRAY), "smoke": images.smoke(images.GRAY)},
    "pathfinder": {
        "paper": pathfinder.PAPER,
        "small": pathfinder.SMALL,
        "smoke": pathfinder.smoke(pathfinder.PAPER),
    },
    "pathx": {
        "paper": pathfinder.PATH_X,
        "small": pathfinder.SMALL,
        "smoke": pathfinder.smoke(pathfinder.PATH_X),
    },
    "path256": {
        "paper": pathfinder.PATH_256,
        "small": pathfinder.SMALL,
        "smoke": pathfinder.smoke(pathfinder.PATH_256),
    },
}

if __name__ == "__main__":
    main(RECIPES, prog="python -m experiments.lra.train")
