"""Several runs of one task after another, each in a folder of its own below that of all."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from experiments.common.errors import RunError
from experiments.common.task import Recipe
from experiments.common.train import train
from experiments.common.workdir import Workdir
from experiments.report.runs import read

SMOOTH_WIDTH = 7  # the default of the paper's code where it smooths


def train_all(
    recipes: Mapping[str, Recipe], folder: Path, console: Console, after: Callable[[str], None] | None = None
) -> dict[str, str]:
    """Trains each recipe in the folder of its name, goes on where it was killed, and leaves alone what is finished.

    Args:
      recipes: by name.
      folder: of all runs.
      console: for progress.
      after: is called with the name of each run that is at its end, before the next one begins.

    Returns:
      Why those that could not be trained to the end could not: a run that diverges does not keep the others from
      theirs.

    Raises:
      RunError: if a folder is that of something else, or a run is asked for wrongly.
    """
    if (folder / "run.json").exists():
        raise RunError(f"workdir must be a folder for several runs; got {folder}, which is that of one.")
    failed = {}
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        place = folder / name
        if is_finished(place, recipe):
            console.print(f"{number}/{len(recipes)} {name}: finished before")
        else:
            console.print(f"{number}/{len(recipes)} {name}")
            try:
                train(recipe, place, console=console)
            except (FloatingPointError, NotImplementedError) as error:
                console.print(f"{name}: {error}", soft_wrap=True, markup=False)
                failed[name] = str(error)
                continue
        if after is not None:
            after(name)
    return failed


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the run of this recipe in this folder is at its end, checkpoint included.

    Raises:
      RunError: if the folder is that of another recipe, or of something else.
    """
    if not (folder / "run.json").exists():
        return False
    Workdir(folder, recipe)
    return read(folder).finished and (folder / "checkpoints" / str(recipe.steps)).is_dir()


def regularizations(recipe: Recipe) -> dict[str, Recipe]:
    """The paper's ablation: random and geometrically decaying kernels, not regularised, smoothed, squashed, or both.

    The threshold of the squash is the recipe's own, the width of the smoothing too, or else that of the paper's code.

    Raises:
      RunError: if the recipe has no such options, or its threshold is 0.
    """
    for name in ("kernel_init", "squash_threshold", "smooth_width"):
        if not hasattr(recipe, name):
            raise RunError(f"sweep regularization needs a recipe with the option {name}; got {type(recipe).__name__}.")
    threshold, width = recipe.squash_threshold, max(recipe.smooth_width, 1)  # type: ignore[attr-defined]
    if not threshold > 0:
        raise RunError(f"squash_threshold must be above 0 for the sweep regularization; got {threshold}.")
    smooth, squash = {"smooth_width": width if width > 1 else SMOOTH_WIDTH}, {"squash_threshold": threshold}
    none = {"smooth_width": 1, "squash_threshold": 0.0}
    ways = {"none": none, "smooth": none | smooth, "squash": none | squash, "both": smooth | squash}
    return {
        f"{init}-{way}": dataclasses.replace(recipe, kernel_init=init, **options)  # type: ignore[call-arg]
        for init in ("random", "geometric_decay")
        for way, options in ways.items()
    }


SWEEPS = {"regularization": regularizations}
