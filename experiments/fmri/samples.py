"""Samples of brain data for `experiments.data.show`."""

from pathlib import Path

import numpy as np

from experiments.data.samples import Series
from experiments.fmri.folder import TABLE, Folder
from experiments.fmri.release import Archives
from experiments.fmri.runs import Runs
from experiments.fmri.synthetic import Generated, Study


def samples(data_dir: Path | None, count: int, seed: int) -> Series:
    """Random runs of a folder of archives, or of one with a table; without a folder, made-up ones."""
    runs: Runs
    if data_dir is None:
        runs, source = Generated(Study(seed=seed)), "made up, not brains; give --data-dir for archives of runs"
    else:
        kind = Folder if (data_dir / TABLE).exists() else Archives
        runs, source = kind(data_dir, labelled=False), f"runs in {data_dir}"
    numbers = np.random.default_rng(seed).permutation(len(runs))[:count].tolist()
    found = [runs[number] for number in numbers]
    labels = [
        f"{runs.origins[number].dataset}, {runs.origins[number].subject}"
        + ("" if run.label is None else f", task {run.label}")
        for number, run in zip(numbers, found, strict=True)
    ]
    return Series(source, labels, [run.bold for run in found], [run.t_r for run in found])
