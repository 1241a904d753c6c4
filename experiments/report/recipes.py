"""The presets with the full settings of all tasks, to say in what a run departs from them."""

import functools
import json
from dataclasses import asdict
from typing import Any, NamedTuple

REDUCED = ("small", "smoke")


class Preset(NamedTuple):
    """A preset by its name, `paper` in most tasks, and its options as run.json would hold them."""

    name: str
    options: dict[str, Any]


@functools.cache
def presets() -> list[Preset]:
    """Those of all tasks but the ones reduced to minutes or seconds, whose names begin with `small` or `smoke`."""
    from experiments.digits.train import RECIPES as DIGITS
    from experiments.fmri.train import RECIPES as FMRI
    from experiments.images.train import RECIPES as IMAGES
    from experiments.language.train import RECIPES as LANGUAGE
    from experiments.lra.train import RECIPES as LRA

    return [
        Preset(name, json.loads(json.dumps({"name": type(recipe).__name__, **asdict(recipe)}, default=str)))
        for family in (LRA, IMAGES, FMRI, LANGUAGE, DIGITS)
        for task in family.values()
        for name, recipe in task.items()
        if not name.startswith(REDUCED)
    ]
