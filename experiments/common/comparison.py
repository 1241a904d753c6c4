"""What comparisons of several models have in common: their command, and a table as a part of a page."""

import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from experiments.common.command import Command, Recipes, parse
from experiments.common.errors import RunError


def main[Options](
    options: type[Options],
    compare: Callable[[Command, Options, Path], object],
    *,
    prog: str,
    usage: str,
    recipes: Recipes,
) -> None:
    """Runs a comparison as the command line asks for; what can go wrong outside of the program is one sentence.

    Args:
      options: a dataclass of what the comparison has besides the options of the recipe.
      compare: trains what is not trained yet, and shows it, given both and a folder.
      prog: how the command is called.
      usage: what ``--help`` says before the options.
      recipes: by task and preset.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        tyro.cli(options, args=["--help"], prog=prog, description=usage)
    try:
        chosen, others = tyro.cli(options, args=arguments, prog=prog, return_unknown_args=True, add_help=False)
        command = parse(recipes, prog, others)
        check_options(command)
        compare(command, chosen, command.workdir or Path("reports") / f"compare-{command.task}-{command.preset}")
    except (RunError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted. The same command goes on.") from None
    except OSError as error:
        raise SystemExit(f"error: {error}. What was measured so far is in the folder of the comparison.") from error


def check_options(command: Command) -> None:
    """Refuses the options of a single run.

    Raises:
      RunError: naming one, and what to do instead.
    """
    train = "train the models one by one with the train command of the task"
    without = {
        "sweep": "A sweep is a command of its own, the train command of the task.",
        "profile_steps": f"To profile models, {train}.",
    }
    for name in ("coordinator", "num_processes", "process_id"):
        without[f"distributed.{name}"] = f"A comparison is of one process and all of its devices; for more, {train}."
    for name, instead in without.items():
        value = operator.attrgetter(name)(command)
        if value is not None:
            raise RunError(f"{name} must not be given to a comparison; got {value}. {instead}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as lines of Markdown.

    >>> print(markdown_table(["model", "parameters"], [["small", "7"]]))
    | model | parameters |
    | --- | --- |
    | small | 7 |
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
