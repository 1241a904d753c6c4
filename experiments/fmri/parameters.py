"""The parameters of a trained model as one file of numpy, for another model to start from."""

import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from experiments.common.workdir import write_whole

FILE = "model.npz"
SHARED = ("encoder", "blocks", "final_norm")  # of a model that predicts and one that decodes


def write(folder: Path, params: Any) -> None:
    """Writes the parameters into the folder of a run, each under its path in the tree."""
    buffer = io.BytesIO()
    np.savez(buffer, **traverse_util.flatten_dict(jax.device_get(params), sep="/"))
    write_whole(folder / FILE, buffer.getvalue())


def read(file: Path, like: Any) -> dict[str, Any]:
    """Those that both heads share, for a model with parameters like these.

    Raises:
      ValueError: if the file cannot be read, or is that of a model of other sizes.
    """
    wanted = {
        name: leaf.shape
        for name, leaf in traverse_util.flatten_dict(like, sep="/").items()
        if name.split("/")[0] in SHARED
    }
    try:
        with np.load(file, allow_pickle=False) as content:
            found = {name: content[name] for name in content.files if name.split("/")[0] in SHARED}
    except Exception as error:  # numpy and zipfile have many
        raise ValueError(
            f"pretrained must be the {FILE} of a run of the task prediction; got {file} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})."
        ) from error
    shapes = {name: array.shape for name, array in found.items()}
    if shapes != wanted:
        name = min(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise ValueError(
            f"pretrained must be a model of the same sizes, with {name} of shape {wanted.get(name, 'none')}; got "
            f"{file}, where it is {shapes.get(name, 'not there')}."
        )
    return traverse_util.unflatten_dict(found, sep="/")
