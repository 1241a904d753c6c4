"""Training examples of brain data, for `registry`."""

from pathlib import Path

import numpy as np

from experiments.common.splits import Source
from experiments.fmri import recipe, windows
from experiments.fmri.folder import TABLE, Folder
from experiments.fmri.runs import Runs

_VOLUMES = 240  # of a run: the published ones have 200 to 300


class _Windows:
    """A window of each run, as training takes them, but always the same one."""

    def __init__(self, runs: Runs, length: int) -> None:
        self._runs, self._length = runs, length

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, number: int, /) -> windows.Example:
        return windows.random_window(self._runs[number], self._length, np.random.default_rng(number))


def source(data_dir: Path | None, rows: int) -> Source:
    """Windows of runs of noise, of the published size, each read from an .npy file of its own."""
    if data_dir is None:
        raise ValueError("data_dir must be a folder for runs; got None.")
    folder = data_dir / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(rows):
        np.save(
            folder / f"{number}.npy", rng.normal(size=(_VOLUMES, recipe.PREDICTION_PAPER.networks)).astype(np.float32)
        )
    (folder / TABLE).write_text("file,t_r\n" + "".join(f"{number}.npy,1.0\n" for number in range(rows)))
    return _Windows(Folder(folder, labelled=False), recipe.PREDICTION_PAPER.window)
