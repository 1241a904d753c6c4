"""The options of the digits experiment."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.digits.data import SIDE, TRAIN_ROWS


@dataclass(frozen=True)
class Config:
    """Train a LongConv classifier on handwritten digits, read as sequences of 1,024 pixels.

    Real data and nothing to download: the digits ship inside scikit-learn. The defaults reach about 98.5 % of the test
    images, and 97 % surely, after two to three minutes on two CPU cores; another seed moves that by half a percent.
    """

    report_dir: Path | None = None
    """A new or empty folder for metrics and figures; by default reports/digits/<time>."""

    seed: int = 0
    """Fixes the initialisation, the order and the shifts of the images, and the dropout."""

    epochs: int = 8
    """Passes over the 1,397 training images."""

    batch_size: int = 25
    """Images per step."""

    shift: int = 2
    """Training images are moved by up to so many of their 32 pixels, at random in each direction."""

    layers: int = 2
    """Residual blocks, each around one long convolution."""

    features: int = 32
    """Width of the model."""

    channels: int = 2
    """Kernels per feature."""

    learning_rate: float = 0.02
    """Peak learning rate of everything but the kernels."""

    kernel_learning_rate: float = 0.005
    """Peak learning rate of the kernels."""

    weight_decay: float = 0.05
    """AdamW's decay of everything but the kernels, which have none."""

    warmup_epochs: float = 1.0
    """Linear warm-up, before the half cosine down to zero."""

    squash_threshold: float = 0.001
    """Taps below it are zero; the others move towards zero by it."""

    kernel_dropout_rate: float = 0.2
    """Fraction of the taps dropped in each training step."""

    def __post_init__(self) -> None:
        for name in ("epochs", "layers", "features", "channels"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "kernel_learning_rate", "weight_decay", "squash_threshold"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("shift", 0 <= self.shift < SIDE, f"from 0 to {SIDE - 1}")
        self._require("batch_size", 1 <= self.batch_size <= TRAIN_ROWS, f"from 1 to {TRAIN_ROWS}, the training images")
        self._require("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, f"from 0 to below epochs = {self.epochs}")
        self._require("kernel_dropout_rate", 0 <= self.kernel_dropout_rate < 1, "from 0 to below 1")

    def _require(self, name: str, fulfilled: bool, expected: str) -> None:
        if not fulfilled:
            raise ValueError(f"{name} must be {expected}; got {getattr(self, name)}.")


def from_command_line() -> Config:
    """The defaults, changed by the command line."""
    return tyro.cli(Config, prog="python -m experiments.digits.train")
