"""The archives of Thomas et al. (2022), which are in the repository `athms/learning-from-brains`.

`data/upstream/<dataset>/*.tar` have one run each, `data/downstream/<dataset>/*.tar` the trials of one. A sample is the
members whose names agree up to the first dot: `<key>.bold.pyd` and `<key>.t_r.pyd`, pickles of an array (T, 1024) and
of seconds, and downstream `<key>.task_label.pyd`, or for the Human Connectome Project
`<key>.label_across_tasks.pyd`. Nothing is unpacked: a sample is read where it lies.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.archives import Place, places
from experiments.fmri import pickles
from experiments.fmri.runs import Origin, Run, checked

SIGNAL, REPETITION_TIME = "bold.pyd", "t_r.pyd"
LABELS = ("label_across_tasks.pyd", "task_label.pyd")  # the first that a sample has


class Sample(NamedTuple):
    """Where a run or a trial is."""

    archive: Path
    members: dict[str, Place]
    """By the part of the name behind the first dot."""


class Archives:
    """All samples below a folder, in the order of the archives' names. Opening it reads no signal.

    Args:
      folder: whose archives to read, such as `data/upstream`.
      labelled: whether samples must have a label.

    Raises:
      ValueError: if there are none, or for an archive that is damaged or has a sample that lacks a part.
    """

    def __init__(self, folder: Path, *, labelled: bool) -> None:
        self.samples: list[Sample] = []
        self.origins: list[Origin] = []
        self._labelled = labelled
        archives = sorted(folder.rglob("*.tar"))
        if not archives:
            raise ValueError(
                f"tar_dir must be a folder with archives of brain data, .tar, at any depth; got {folder}, which has "
                "none. Those of Thomas et al. come with a clone of github.com/athms/learning-from-brains, 13 GB, in "
                "data/upstream and data/downstream."
            )
        for archive in archives:
            for key, members in _samples(archive).items():
                self._check(archive, key, members)
                self.samples.append(Sample(archive, members))
                self.origins.append(Origin(_dataset(archive), _subject(archive), key))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Run:
        sample = self.samples[number]
        label = next((self._load(sample, part) for part in LABELS if part in sample.members), None)
        where = f"{sample.archive}: {sample.members[SIGNAL].name}"
        return checked(self._load(sample, SIGNAL), self._load(sample, REPETITION_TIME), label, where)

    def _load(self, sample: Sample, part: str) -> Any:
        place = sample.members[part]
        return pickles.loads(place.read(), f"{sample.archive}: {place.name}")

    def _check(self, archive: Path, key: str, members: dict[str, Place]) -> None:
        for part in (SIGNAL, REPETITION_TIME):
            if part not in members:
                raise ValueError(f"{archive}: expected {key}.{part} beside {key}.{min(members)}; it is not there.")
        if self._labelled and not members.keys() & set(LABELS):
            raise ValueError(f"{archive}: expected {key}.{LABELS[1]} or {key}.{LABELS[0]}; neither is there.")


def _samples(archive: Path) -> dict[str, dict[str, Place]]:
    samples: dict[str, dict[str, Place]] = {}
    for place in places(archive):
        folder, slash, file = place.name.rpartition("/")
        start, _, part = file.partition(".")
        samples.setdefault(f"{folder}{slash}{start}", {})[part] = place
    return samples


def _dataset(archive: Path) -> str:
    found = re.match(r"ds-([^_.]+)_", archive.name)
    return found[1] if found else archive.parent.name


def _subject(archive: Path) -> str:
    """Of the name; an archive that names none is a subject of its own."""
    found = re.search(r"sub-([^_.]+)", archive.name)
    return found[1] if found else archive.stem
