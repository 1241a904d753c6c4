"""Collects runs into one page: `python -m experiments.report --help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from experiments.report.collect import collect


@dataclass(frozen=True)
class Report:
    """Collect runs into one page, with published figures beside them.

    For each task: scores, throughput and memory of its runs, the published scores with their sources, learning curves,
    the smoothness and pictures of the kernels, all options. Runs that are not finished or damaged are shown as far as
    they go, and the page says what is wrong with which.
    """

    workdirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, or folders of such folders, as a sweep and a comparison leave them."""

    out: Path = Path("reports/page")
    """Folder of the page. What an earlier page left there is replaced."""

    format: Literal["html", "markdown"] = "html"
    """html is index.html, one file with everything in it; markdown is report.md with its pictures beside it."""


def main() -> None:
    options = tyro.cli(Report, prog="python -m experiments.report")
    try:
        print(f"wrote {collect(options.workdirs, options.out, options.format, Console(stderr=True))}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
