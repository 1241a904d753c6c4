"""Makes the folder of a dataset once: whole or not at all, by one process at a time; and the commands that do."""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def prepared(folder: Path, write: Callable[[], None], console: Console | None = None) -> Path:
    """Has a folder written unless it is there, and returns it.

    A folder has this name only when it is whole: `write` makes it beside, as `incomplete.<anything>_<name>`, and
    renames it in the end, as tensorflow-datasets does. Of two processes one writes while the other waits, and what a
    killed process left behind is removed. Beside the folder stays an empty file `.lock`.

    Raises:
      ValueError: if the folder cannot be made or written to, for example because the disk is full. It names the folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as data_dir:
    ...     def write():
    ...         beside = Path(data_dir, "squares", "incomplete.0_1.0.0")
    ...         beside.mkdir()
    ...         (beside / "rows.txt").write_text("0 1 4 9")
    ...         beside.rename(beside.with_name("1.0.0"))
    ...     (prepared(Path(data_dir, "squares", "1.0.0"), write) / "rows.txt").read_text()
    '0 1 4 9'
    """
    console = console or Console(quiet=True)
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / ".lock", console):
            for left_behind in folder.parent.glob(f"incomplete.*_{folder.name}"):
                shutil.rmtree(left_behind)
            if not folder.exists():
                write()
    except OSError as error:
        raise ValueError(
            f"{folder} must be a folder that can be made and written to; got {error.strerror or error}. Nothing half "
            "was kept."
        ) from error
    return folder


def progress(console: Console) -> Progress:
    """Bars on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def command[Options](
    options: type[Options], prepare: Callable[[Options, Console], tuple[Path, int]], *, prog: str, rows: str
) -> None:
    """What `python -m` of a dataset runs: prepares it by the options of the command line.

    Args:
      options: a dataclass.
      prepare: has the folder made, and returns it and the number of rows in it.
      prog: the command, for its help.
      rows: what they are.
    """
    console = Console()
    try:
        chosen = tyro.cli(options, prog=prog)
        start = time.perf_counter()
        folder, count = prepare(chosen, console)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run the same command again to start over.") from None
    console.print(f"{count:,} {rows} are in {folder} ({time.perf_counter() - start:.0f} s)", soft_wrap=True)


@contextlib.contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    """Waits until no other process has this file. The system lets go of it if a process is killed."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"waiting for the process that prepares {path.parent}", soft_wrap=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
