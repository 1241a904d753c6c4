"""From runs to examples of one shape: windows of so many volumes, and which runs are for what."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from experiments.fmri.runs import Origin, Run, Runs

SHORTEST = 2  # volumes: one to see, one to predict

type Example = dict[str, np.ndarray | np.generic]


def window(run: Run, start: int, length: int) -> Example:
    """The volumes from one on, padded with zeros where the run ends."""
    part = run.bold[start : start + length]
    bold = np.zeros((length, run.bold.shape[1]), np.float32)
    bold[: len(part)] = part
    example: Example = {"bold": bold, "t_r": np.float32(run.t_r), "lengths": np.int32(len(part))}
    return example if run.label is None else {**example, "labels": np.int32(run.label)}


def random_window(run: Run, length: int, rng: np.random.Generator) -> Example:
    """A window that fits, wherever; the whole of a shorter run."""
    return window(run, int(rng.integers(max(len(run.bold) - length, 0) + 1)), length)


class Selected:
    """Some of the runs, each checked when it is read: for training, which takes a window of each at random.

    Args:
      runs: to select from.
      numbers: of those selected.
      networks: that each must have.
      num_classes: below which labels must be, where there are any.
    """

    def __init__(self, runs: Runs, numbers: Sequence[int], networks: int, num_classes: int | None) -> None:
        self._runs, self._numbers = runs, list(numbers)
        self._networks, self._num_classes = networks, num_classes

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Run:
        """Raises ValueError if the run has other networks or labels, or is too short."""
        run, name = self._runs[self._numbers[number]], "/".join(self._runs.origins[self._numbers[number]])
        volumes, networks = run.bold.shape
        if networks != self._networks:
            raise ValueError(f"networks must be those of the data, {networks} in {name}; got {self._networks}.")
        if volumes < SHORTEST:
            raise ValueError(f"{name}: expected at least {SHORTEST} volumes; got {volumes}.")
        if self._num_classes is None:
            return run._replace(label=None)
        if run.label is None or run.label >= self._num_classes:
            raise ValueError(f"{name}: expected a label from 0 to {self._num_classes - 1}; got {run.label}.")
        return run


class Windows:
    """All windows of the runs, one behind the other: for evaluation. Opening it reads every run, for its length."""

    def __init__(self, runs: Selected, length: int) -> None:
        self._runs, self._length = runs, length
        self._starts: list[tuple[int, int]] = []
        for number in range(len(runs)):
            volumes = len(runs[number].bold)
            self._starts += [(number, start) for start in range(0, volumes - SHORTEST + 1, length)]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Example:
        run, start = self._starts[number]
        return window(self._runs[run], start, self._length)


def split_runs(origins: Sequence[Origin], share: float, seed: int, least: int = 2) -> tuple[list[int], list[int]]:
    """The runs for training and for validation: of each dataset this share, at least so many, at random."""
    of_dataset: dict[str, list[int]] = defaultdict(list)
    for number, origin in enumerate(origins):
        of_dataset[origin.dataset].append(number)
    rng = np.random.default_rng(seed)
    validation: set[int] = set()
    for numbers in of_dataset.values():
        count = min(max(least, round(share * len(numbers))), len(numbers) - 1)
        validation |= set(rng.permutation(numbers)[:count].tolist())
    return [number for number in range(len(origins)) if number not in validation], sorted(validation)


def split_subjects(origins: Sequence[Origin], shares: tuple[float, float], seed: int) -> tuple[list[int], ...]:
    """The runs for training, validation and testing: no subject is in two of them.

    Args:
      origins: of the runs.
      shares: of the subjects, for validation and for testing; at least one subject each.
      seed: of the choice.

    Raises:
      ValueError: if there are fewer than three subjects.
    """
    subjects = sorted({(origin.dataset, origin.subject) for origin in origins})
    counts = [max(1, round(share * len(subjects))) for share in shares]
    if len(subjects) <= sum(counts):
        raise ValueError(
            f"the data must have at least {sum(counts) + 1} subjects for training, validation and testing; got "
            f"{len(subjects)}."
        )
    order = np.random.default_rng(seed).permutation(len(subjects))
    split = {subjects[place]: 0 for place in order}
    split |= {subjects[place]: 1 for place in order[: counts[0]]}
    split |= {subjects[place]: 2 for place in order[counts[0] : sum(counts)]}
    return tuple(
        [number for number, origin in enumerate(origins) if split[origin.dataset, origin.subject] == which]
        for which in range(3)
    )
