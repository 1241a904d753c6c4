"""The options of both tasks of brain data, and the sets of them that `experiments.fmri.train` knows by name."""

import functools
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.common.classifier import ClassifierRecipe
from experiments.common.task import SMOKE_SCHEDULE, Batch, Measure, Task, classification
from experiments.fmri import parameters, windows
from experiments.fmri.folder import Folder
from experiments.fmri.model import BrainModel
from experiments.fmri.release import Archives
from experiments.fmri.runs import Run, Runs
from experiments.fmri.synthetic import Generated, Study


def look(model: nn.Module, batch: Batch, deterministic: bool) -> jax.Array:
    """What the model makes of a batch of windows."""
    return model(batch["bold"], batch["t_r"], lengths=batch["lengths"], deterministic=deterministic)


def prediction_error(predicted: jax.Array, batch: Batch) -> dict[str, Measure]:
    """Mean absolute error of each volume given those before it; and of two guesses that need no model.

    `last_volume` guesses that nothing changes, `zero` the mean, which is zero in data that are standardised.
    """
    bold = batch["bold"]
    known = jnp.arange(1, bold.shape[1]) < batch["lengths"][:, None]

    def error(guess: jax.Array | float) -> Measure:
        each = jnp.abs(bold[:, 1:] - guess).mean(-1)
        return Measure(jnp.where(known, each, 0).sum(-1), known.sum(-1).astype(each.dtype))

    return {"loss": error(predicted[:, :-1]), "last_volume": error(bold[:, :-1]), "zero": error(0.0)}


@dataclass(frozen=True, kw_only=True)
class BrainRecipe(ClassifierRecipe):
    """Options of the data and of the model that both tasks have."""

    norm: Literal["batch", "layer"] = "layer"
    prenorm: bool = True

    window: int = 50
    """Volumes of an example, and taps of the kernels. Thomas et al. have 10 to 50."""

    networks: int = 1024
    """Signals of each volume."""

    source: Literal["archives", "arrays", "generated"] = "archives"
    """Which runs: released, of one's own, or made up, which are not brains but look like them."""

    tar_dir: Path = Path("data/learning-from-brains/data")
    """Folder of the released archives."""

    array_dir: Path = Path("data/runs")
    """Folder of arrays: .npy or .npz files, and a table, runs.csv."""

    study: Study = field(default_factory=Study)
    """What to generate."""

    split_seed: int = 1234
    """Of the choice of runs or subjects for training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("bidirectional", not self.bidirectional, "False, because what comes next must not be seen")
        self.require("window", self.window >= windows.SHORTEST, f"at least {windows.SHORTEST}")
        self.require("networks", self.networks >= 1, "at least 1")
        self.require("split_seed", self.split_seed >= 0, "at least 0")
        fits = self.source != "generated" or self.networks == self.study.networks
        self.require("networks", fits, f"those of the study, {self.study.networks}")

    @property
    def whereabouts(self) -> tuple[str, ...]:
        """The runs are the same in any folder."""
        return *super().whereabouts, "tar_dir", "array_dir"

    def runs(self, *, labelled: bool) -> Runs:
        """All runs, from the place that the options name."""
        match self.source:
            case "archives":
                return Archives(self.tar_dir, labelled=labelled)
            case "arrays":
                return Folder(self.array_dir, labelled=labelled)
        return Generated(self.study)

    @abstractmethod
    def model(self) -> BrainModel:
        """What is trained."""

    def brain_model(self, num_classes: int | None) -> BrainModel:
        """The model with one head or the other."""
        return BrainModel(
            networks=self.networks,
            features=self.features,
            num_layers=self.num_layers,
            kernel_length=self.window,
            num_classes=num_classes,
            layer=self.layer(),
            norm=self.norm,
            prenorm=self.prenorm,
            dropout_rate=self.dropout_rate,
            dtype=jnp.dtype(self.dtype),
        )

    def random_windows(self, runs: windows.Selected) -> grain.MapDataset:
        """One window of each run in an epoch, at random."""
        return grain.MapDataset.source(runs).seed(self.seed).shuffle().random_map(self._window)

    def all_windows(self, runs: windows.Selected) -> grain.MapDataset:
        return grain.MapDataset.source(windows.Windows(runs, self.window))

    def _window(self, run: Run, rng: np.random.Generator) -> windows.Example:
        return windows.random_window(run, self.window, rng)


@dataclass(frozen=True, kw_only=True)
class Prediction(BrainRecipe):
    """Predict each volume of brain activity from those before it, by its mean absolute error.

    The preset `paper` reads the archives of Thomas et al.: 11,747 runs of 1,024 networks. The paper reports an error of
    0.54 there (second-hand) and no settings; those of the preset are ours, and have not been run to the end. `small`
    draws what looks like brain data and takes two minutes on two CPU cores; `smoke` takes seconds and learns nothing.
    """

    steps: int = 20_000
    batch_size: int = 192
    learning_rate: float = 0.001
    kernel_learning_rate: float | None = 0.0005
    weight_decay: float = 0.05
    warmup_steps: int = 1000
    log_every: int = 50
    evaluate_every: int = 1000
    checkpoint_every: int = 1000

    num_layers: int = 4
    features: int = 768
    dropout_rate: float = 0.1
    tar_dir: Path = Path("data/learning-from-brains/data/upstream")

    validation_share: float = 0.05
    """Of the runs of each dataset, at least two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("validation_share", 0 < self.validation_share < 1, "between 0 and 1")

    def model(self) -> BrainModel:
        return self.brain_model(None)

    def build(self) -> Task:
        runs = self.runs(labelled=False)
        training, validation = windows.split_runs(runs.origins, self.validation_share, self.split_seed)
        if not validation:
            raise ValueError("the data must have two runs of a dataset, one to train with and one to validate; got 1.")
        selected = functools.partial(windows.Selected, runs, networks=self.networks, num_classes=None)
        return Task(
            self.model(),
            train=self.random_windows(selected(training)),
            evaluation={"validation": self.all_windows(selected(validation))},
            forward=look,
            measure=prediction_error,
            score="loss",
        )


@dataclass(frozen=True, kw_only=True)
class Decoding(BrainRecipe):
    """Say from a window of brain activity which task a person was doing; people of the test are not in training.

    The preset `paper` reads the archives of the multi-domain task battery, 26 tasks, and starts from a model that
    predicts if `pretrained` names one; its settings are ours. `small` draws what looks like brain data and takes two
    minutes on two CPU cores; `smoke` takes seconds and learns nothing.
    """

    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 0.0005
    kernel_learning_rate: float | None = 0.0002
    weight_decay: float = 0.05
    warmup_steps: int = 500
    log_every: int = 50
    evaluate_every: int = 500
    checkpoint_every: int = 500

    num_layers: int = 4
    features: int = 768
    dropout_rate: float = 0.1
    tar_dir: Path = Path("data/learning-from-brains/data/downstream/ds002105")

    num_classes: int = 26
    """Tasks: 26 of the multi-domain task battery, 20 of the Human Connectome Project."""

    validation_share: float = 0.13
    """Of the subjects."""

    test_share: float = 0.39
    """Of the subjects."""

    pretrained: Path | None = None
    """The model.npz of a run of the task prediction with the same sizes, to start from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_classes", self.num_classes >= 2, "at least 2")
        for name in ("validation_share", "test_share"):
            self.require(name, 0 < getattr(self, name) < 1, "between 0 and 1")

    def model(self) -> BrainModel:
        return self.brain_model(self.num_classes)

    def build(self) -> Task:
        runs = self.runs(labelled=True)
        shares = self.validation_share, self.test_share
        numbers = windows.split_subjects(runs.origins, shares, self.split_seed)
        train, validation, test = (windows.Selected(runs, which, self.networks, self.num_classes) for which in numbers)
        return Task(
            self.model(),
            train=self.random_windows(train),
            evaluation={"validation": self.all_windows(validation), "test": self.all_windows(test)},
            forward=look,
            measure=classification,
            initial=self._initial(),
        )

    def _initial(self) -> dict[str, Any]:
        """The parameters to start from, where there are such."""
        if self.pretrained is None:
            return {}
        model = self.model()
        like = jax.eval_shape(
            lambda: model.init(
                jax.random.key(0), np.zeros((1, self.window, self.networks), np.float32), np.ones(1), deterministic=True
            )
        )["params"]
        return parameters.read(self.pretrained, like)


PREDICTION_PAPER = Prediction()
DECODING_PAPER = Decoding()

SMALL: dict[str, Any] = {
    "batch_size": 32,
    "learning_rate": 0.003,
    "kernel_learning_rate": 0.003,
    "warmup_steps": 50,
    "log_every": 20,
    "evaluate_every": 100,
    "checkpoint_every": 100,
    "num_layers": 2,
    "features": 64,
    "channels": 1,
    "squash_threshold": 0.001,
    "dropout_rate": 0.0,
    "kernel_dropout_rate": 0.0,
    "window": 48,
    "networks": 64,
    "source": "generated",
}
PREDICTION_SMALL = Prediction(**SMALL, steps=600)
# With a signal of 1, as for prediction, all windows are decoded after 100 steps.
DECODING_SMALL = Decoding(**SMALL, steps=200, num_classes=4, study=Study(signal=0.3))

SMOKE: dict[str, Any] = {
    **SMOKE_SCHEDULE,
    "num_layers": 2,
    "features": 8,
    "window": 12,
    "networks": 5,
    "source": "generated",
    "study": Study(networks=5, tasks=2, subjects=4, runs=1, volumes=20),
}
PREDICTION_SMOKE = Prediction(**SMOKE)
DECODING_SMOKE = Decoding(**SMOKE, num_classes=2)
