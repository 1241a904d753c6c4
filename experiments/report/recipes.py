"""The presets `paper` of all tasks, to say in what a run departs from its own."""

import functools
import json
from dataclasses import asdict
from typing import Any


@functools.cache
def papers() -> list[dict[str, Any]]:
    """As run.json would hold their options."""
    from experiments.images.train import RECIPES as IMAGES
    from experiments.lra.train import RECIPES as LRA

    presets = [table["paper"] for table in [*LRA.values(), *IMAGES.values()] if "paper" in table]
    return [json.loads(json.dumps({"name": type(one).__name__, **asdict(one)}, default=str)) for one in presets]
