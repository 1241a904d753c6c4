"""From folders of runs to the folder of their page."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from experiments.common.workdir import write_whole
from experiments.report import content, kernels, page
from experiments.report.runs import read_all

type Format = Literal["html", "markdown"]


def collect(workdirs: Sequence[Path], out: Path, form: Format, console: Console) -> Path:
    """Writes the page and, for each run with long kernels, the figures of each kernel as JSON; returns the page's file.

    Raises:
      ValueError: if none of the folders is one of a run, or the page cannot be written.
    """
    runs, left_out = read_all(list(workdirs))
    for reason in left_out.values():
        console.print(f"left out: {reason}", soft_wrap=True, markup=False)
    if not runs:
        raise ValueError(f"workdirs must be folders of runs; got {', '.join(map(str, workdirs))}, and none is.")
    everything = [content.look(run) for run in track(runs, "reading", console=console, transient=True)]
    blocks = content.page(everything, left_out)
    writer = page.write_html if form == "html" else page.write_markdown
    try:
        out.mkdir(parents=True, exist_ok=True)
        for run, found, _ in everything:
            if found is not None:
                write_whole(out / f"kernels-{content.file_name(run.name)}.json", kernels.every_kernel(found))
        return writer(f"Runs, {datetime.now(UTC):%Y-%m-%d}", blocks, out)
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written to; got {out} ({error.strerror}).") from error
