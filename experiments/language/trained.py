"""The model of a finished or unfinished training run."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import flashbutterfly_jax as fb
from experiments.common.checkpoints import Checkpoints
from experiments.common.errors import RunError
from experiments.common.train import State, abstract
from experiments.language.recipe import Language
from experiments.language.tokenizers import Tokenizer, make_tokenizer


class Trained(NamedTuple):
    """A model and what belongs to it."""

    recipe: Language
    model: fb.linen.LanguageModel
    variables: dict[str, Any]
    tokenizer: Tokenizer
    step: int


def load(folder: Path) -> Trained:
    """The latest checkpoint of the run in a folder.

    Raises:
      RunError: if there is no run of a language model, or its checkpoint or tokenizer is not what its recipe says.
    """
    recipe = recipe_of(folder)
    try:
        tokenizer = make_tokenizer(recipe.tokenizer)
    except ValueError as error:
        raise RunError(str(error)) from error
    if not (folder / "checkpoints").is_dir():
        raise RunError(f"workdir must have checkpoints; {folder} has none yet.")
    checkpoints = Checkpoints((folder / "checkpoints").absolute())
    step = checkpoints.latest_step()
    if not step:
        raise RunError(f"workdir must have checkpoints; {folder} has none yet.")
    model = recipe.model(tokenizer.vocab_size)
    shapes = jax.eval_shape(lambda: _initial(recipe, model))
    device = SingleDeviceSharding(jax.devices()[0])
    state = checkpoints.restore(step, jax.tree.map(lambda leaf: abstract(leaf, device), shapes))
    return Trained(recipe, model, {"params": state.params}, tokenizer, step)


def recipe_of(folder: Path) -> Language:
    """The recipe of the run in a folder.

    Raises:
      RunError: if there is none of a language model.
    """
    file = folder / "run.json"
    try:
        fields = dict(json.loads(file.read_text())["recipe"])
    except OSError as error:
        raise RunError(f"workdir must be the folder of a training run; {folder} has no run.json.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} does not describe a training run.") from error
    if fields.pop("name", None) != Language.__name__:
        raise RunError(f"workdir must be the folder of a language model; {folder} has a run of something else.")
    hints = typing.get_type_hints(Language)
    names = {field.name for field in dataclasses.fields(Language)}
    if names != fields.keys():
        raise RunError(
            f"{file} is of another version of this program: it has not the same options "
            f"({', '.join(sorted(names ^ fields.keys()))})."
        )
    try:
        return Language(**{name: _as(hints[name], value) for name, value in fields.items()})
    except (ValueError, TypeError) as error:
        raise RunError(f"{file} describes no run that can be ({error})") from error


def _as(hint: Any, value: Any) -> Any:
    """What JSON made a string or a list of."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, str) and Path in choices:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _initial(recipe: Language, model: fb.linen.LanguageModel) -> State:
    tokens = jnp.zeros((1, recipe.length), jnp.int32)
    params = model.init(jax.random.key(0), tokens, deterministic=True)["params"]
    return State(jnp.int32(0), params, {}, recipe.optimizer().init(params))
