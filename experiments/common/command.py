"""The command line of every family of tasks: `main` is all that its `train.py` calls."""

import difflib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console

from experiments.common.errors import RunError
from experiments.common.figures import learning_curves
from experiments.common.several import SWEEPS, train_all
from experiments.common.task import Recipe
from experiments.common.train import Result, train
from experiments.common.workdir import write_whole
from experiments.report.collect import collect

type Recipes = Mapping[str, Mapping[str, Recipe]]
"""By task and preset. The first preset of a task is its default."""


@dataclass(frozen=True)
class Distributed:
    """For a run of several processes, the same command in each but for process_id."""

    coordinator: str | None = None
    """host:port at which process 0 is reached; None is a run of one process."""

    num_processes: int | None = None
    """How many there are; where a cluster says it itself, it can be left out."""

    process_id: int | None = None
    """From 0; likewise."""


@dataclass(frozen=True)
class Command[R: Recipe]:
    """What a command line says."""

    recipe: Annotated[R, tyro.conf.arg(name="")]

    task: str
    """What to train."""

    preset: str
    """Which of its recipes, from which the options below depart."""

    workdir: Path | None = None
    """Folder of the run. One that is there goes on where it was. By default reports/<task>/<time>."""

    profile_steps: tuple[int, int] | None = None
    """First and last step of a trace, which goes to <workdir>/profile."""

    sweep: Literal["regularization"] | None = None
    """Several runs, in <workdir>/<variant>, and a page of them all in <workdir>/page. regularization is the paper's
    ablation: random and geometrically decaying kernels, not regularised, smoothed, squashed, or both."""

    distributed: Distributed = Distributed()


@dataclass(frozen=True)
class Choice:
    task: str | None = None
    preset: str | None = None


def main(recipes: Recipes, prog: str, finish: Callable[[Any, Result, Path], None] | None = None) -> None:
    """Runs what the command line asks for; what can go wrong outside of the program is one sentence.

    Args:
      recipes: that the family has.
      prog: how the command is called.
      finish: is called on process 0 after the last step, with the recipe, the result and the working directory.
    """
    # Orbax and what it uses log each exception, traceback and all, before they raise it; and what a killed run left.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        command = parse(recipes, prog, sys.argv[1:])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    folder = command.workdir or Path("reports") / command.task / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}"
    try:
        start_processes(command)
        if command.sweep is not None:
            run_sweep(command.sweep, command, folder)
            return
        result = train(command.recipe, folder, profile_steps=command.profile_steps, console=Console())
        if jax.process_index() == 0:
            write_whole(folder / "learning_curves.png", learning_curves(result.rows))
            if finish is not None:
                finish(command.recipe, result, folder)
    except (RunError, FloatingPointError, NotImplementedError) as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: {error}. What was measured so far is in {folder}.") from error
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted. The same command with --workdir {folder} goes on.") from None


def parse(recipes: Recipes, prog: str, arguments: list[str]) -> Command:
    """The task and the preset first, because they decide what the other options and their defaults are.

    Raises:
      ValueError: for an unknown task or preset, and for options that their recipe refuses.
    """
    chosen, others = tyro.cli(Choice, args=arguments, return_unknown_args=True, add_help=False)
    asks_for_help = bool({"-h", "--help"} & set(others))
    if chosen.task is None and len(recipes) > 1:
        listing = "; ".join(f"{task} ({', '.join(presets)})" for task, presets in recipes.items())
        if asks_for_help:
            print(
                f"usage: {prog} --task TASK [--preset PRESET] [--workdir FOLDER] [options]\n\ntasks, and the presets "
                f"of each: {listing}\n\n--task TASK --help lists the options of a task."
            )
            raise SystemExit(0)
        raise ValueError(f"task must be given; there are {listing}.")
    task = known("task", chosen.task or next(iter(recipes)), recipes)
    preset = known("preset", chosen.preset or next(iter(recipes[task])), recipes[task])
    recipe = recipes[task][preset]
    description = inspect.getdoc(type(recipe)) or ""
    if len(recipes[task]) > 1:
        description += f"\n\nPresets: {', '.join(recipes[task])}. The defaults below are those of {preset}."
    of_this_recipe: Any = Command[type(recipe)]  # type: ignore[misc]
    return tyro.cli(
        of_this_recipe,
        default=Command(recipe, task, preset),
        args=arguments,
        prog=prog,
        description=description,
    )


def known(what: str, name: str, names: Mapping[str, object]) -> str:
    """The name, if there is such a thing."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
        raise ValueError(f"unknown {what} {name}: {hint}")
    return name


def run_sweep(name: Literal["regularization"], command: Command, folder: Path) -> None:
    """Trains the variants of the recipe, and collects them into a page.

    Raises:
      RunError: if it is asked for together with a profile, or the recipe has not the options that vary.
    """
    if command.profile_steps is not None:
        raise RunError(f"profile_steps must be None in a sweep; got {command.profile_steps}.")
    train_all(SWEEPS[name](command.recipe), folder, Console())
    if jax.process_index() == 0:
        print(f"wrote {collect([folder], folder / 'page', 'html', Console(stderr=True))}")


def start_processes(command: Command) -> None:
    """Joins the other processes of the run.

    Raises:
      RunError: if the options are not what it takes.
    """
    distributed = command.distributed
    if distributed.coordinator is None:
        if distributed.num_processes is not None or distributed.process_id is not None:
            raise RunError("distributed.coordinator must be given with num_processes and process_id; got None.")
        return
    if command.workdir is None:
        raise RunError(
            "workdir must be given in a run of several processes, one folder that all of them see; got None."
        )
    # Otherwise JAX takes SIGTERM for a notice that something worse will follow, and the process goes on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(distributed.coordinator, distributed.num_processes, distributed.process_id)
    except (ValueError, IndexError, RuntimeError) as error:  # each for another option
        raise RunError(
            "distributed.coordinator must be the host:port at which process 0 is reached, with num_processes and "
            f"process_id where no cluster says them; got {distributed.coordinator}, {distributed.num_processes} and "
            f"{distributed.process_id} ({(str(error) or 'no reason').splitlines()[0].rstrip('.')})."
        ) from error
