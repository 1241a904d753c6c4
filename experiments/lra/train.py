"""Trains the models of Long Range Arena: `python -m experiments.lra.train --help`."""

from experiments.common.command import main
from experiments.lra.listops import recipe as listops

RECIPES = {"listops": {"paper": listops.PAPER, "small": listops.SMALL, "smoke": listops.SMOKE}}

if __name__ == "__main__":
    main(RECIPES, prog="python -m experiments.lra.train")
