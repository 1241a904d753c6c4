"""Runs that look like functional magnetic resonance imaging, drawn from a seed: for tests and the demonstration.

Each task is a train of events of its own rhythm, and a pattern over the networks. The response to the events is the
train convolved with the haemodynamic response; to it come slow noise, of a power inversely proportional to the
frequency, of each network by itself and of some that many share. The run then loses what is slower than 0.008 Hz, and
each network gets mean 0 and deviation 1, as in the data of Thomas et al. What a model reaches here says nothing about
brains.
"""

import functools
from dataclasses import dataclass

import numpy as np

from experiments.fmri.runs import Origin, Run

SLOWEST = 0.008  # Hz
EVENTS_PER_SECOND = 10  # of the grid on which events lie
SHARED = 6  # noises that many networks share


@dataclass(frozen=True)
class Study:
    """What decides the runs that are drawn."""

    seed: int = 0
    """Of the drawing."""

    networks: int = 64
    """Parts of the brain, each with a signal."""

    tasks: int = 4
    """Labels. Each subject does every task."""

    subjects: int = 20
    """People, each with deviations from the common patterns."""

    runs: int = 2
    """Of each task, by each subject."""

    volumes: int = 120
    """Of each run."""

    t_r: float = 1.5
    """Seconds from one volume to the next."""

    signal: float = 1.0
    """Deviation of the response to the events, where that of the noise is 1."""

    def __post_init__(self) -> None:
        for name in ("networks", "tasks", "subjects", "runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0; got {self.seed}.")
        if self.volumes < 8:
            raise ValueError(f"volumes must be at least 8; got {self.volumes}.")
        if not 0.1 <= self.t_r <= 10:
            raise ValueError(f"t_r must be from 0.1 to 10 seconds; got {self.t_r}.")
        if not 0 <= self.signal < np.inf:
            raise ValueError(f"signal must be at least 0 and finite; got {self.signal}.")


class Generated:
    """The runs of a study, drawn when they are asked for: run i depends on the study and on i alone."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.origins = [
            Origin("generated", f"{subject:03d}", f"task-{task}_run-{run}")
            for subject in range(study.subjects)
            for task in range(study.tasks)
            for run in range(study.runs)
        ]
        rng = np.random.default_rng(study.seed)
        self._patterns = rng.normal(size=(study.tasks, study.networks))
        self._mixing = rng.normal(size=(SHARED, study.networks)) / np.sqrt(SHARED)
        self._gaps = np.geomspace(4.0, 16.0, study.tasks)  # mean seconds from one event to the next, of each task

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, number: int) -> Run:
        study = self.study
        subject, rest = divmod(range(len(self))[number], study.tasks * study.runs)
        task = rest // study.runs
        deviation = np.random.default_rng([study.seed, 1, subject]).normal(size=(study.tasks, study.networks))
        pattern = self._patterns[task] + 0.5 * deviation[task]
        rng = np.random.default_rng([study.seed, 2, number])
        course = response(events(rng, study.volumes * study.t_r, self._gaps[task]), study.volumes, study.t_r)
        shared = slow_noise(rng, study.volumes, SHARED) @ self._mixing
        noise = (slow_noise(rng, study.volumes, study.networks) + shared) / np.sqrt(2)
        signal = study.signal * course[:, None] * pattern / np.sqrt(1.25)
        return Run(standardized(noise + signal, study.t_r).astype(np.float32), study.t_r, task)


def haemodynamic_response(seconds: np.ndarray) -> np.ndarray:
    r"""What an event at time 0 leaves in the blood: :math:`t^5 e^{-t} / 5! - t^{15} e^{-t} / (6 \cdot 15!)`.

    The usual difference of two gamma densities: a peak after 5 seconds, and an undershoot a sixth as large after 15.

    Example:
      >>> import numpy as np
      >>> seconds = np.arange(0, 30, 0.1)
      >>> response = haemodynamic_response(seconds)
      >>> round(float(seconds[response.argmax()]), 1), round(float(seconds[response.argmin()]), 1)
      (5.0, 15.7)
    """
    from math import factorial

    t = np.maximum(seconds, 0.0)
    return np.exp(-t) * (t**5 / factorial(5) - t**15 / (6 * factorial(15)))


def events(rng: np.random.Generator, seconds: float, gap: float) -> np.ndarray:
    """A train of events on a grid of a tenth of a second: 1 while one lasts, a second, else 0.

    Between two there are at least half of the mean gap.
    """
    train = np.zeros(round(seconds * EVENTS_PER_SECOND))
    onset = rng.exponential(gap / 2)
    while onset < seconds:
        start = int(onset * EVENTS_PER_SECOND)
        train[start : start + EVENTS_PER_SECOND] = 1
        onset += gap / 2 + rng.exponential(gap / 2)
    return train


def response(train: np.ndarray, volumes: int, t_r: float) -> np.ndarray:
    """The train convolved with the haemodynamic response, at the times of the volumes, with mean 0 and deviation 1."""
    kernel = haemodynamic_response(np.arange(0, 32, 1 / EVENTS_PER_SECOND))
    course = np.convolve(train, kernel)
    course = np.interp(np.arange(volumes) * t_r, np.arange(len(course)) / EVENTS_PER_SECOND, course)
    return (course - course.mean()) / max(course.std(), 1e-12)


def slow_noise(rng: np.random.Generator, volumes: int, count: int) -> np.ndarray:
    """Noises (volumes, count) of deviation 1, the power of which is inversely proportional to the frequency."""
    spectrum = np.fft.rfft(rng.normal(size=(volumes, count)), axis=0)
    spectrum *= _amplitudes(volumes)[:, None]
    noise = np.fft.irfft(spectrum, volumes, axis=0)
    return noise / noise.std(axis=0)


@functools.cache
def _amplitudes(volumes: int) -> np.ndarray:
    amplitudes = np.zeros(volumes // 2 + 1)
    amplitudes[1:] = np.arange(1, len(amplitudes)) ** -0.5
    return amplitudes


def standardized(signal: np.ndarray, t_r: float) -> np.ndarray:
    """Without what is slower than 0.008 Hz, and each network with mean 0 and deviation 1."""
    spectrum = np.fft.rfft(signal, axis=0)
    spectrum[np.fft.rfftfreq(len(signal), t_r) < SLOWEST] = 0
    signal = np.fft.irfft(spectrum, len(signal), axis=0)
    return signal / np.maximum(signal.std(axis=0), 1e-12)
