"""The options of every recipe whose model is a stack of residual layers over a sequence."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

import flashbutterfly_jax as fb
from experiments.baselines import LAYERS, label_kernels
from experiments.common.task import Recipe
from flashbutterfly_jax.initializers import ScaledInitializer

KERNEL_INITS: dict[str, ScaledInitializer] = {
    "random": fb.initializers.random(),
    "geometric_decay": fb.initializers.geometric_decay(),
}


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(Recipe):
    """Options of the model. A task adds those of its data, and says how many classes and steps there are."""

    architecture: Literal["long_conv", "transformer", "s4d", "s5"] = "long_conv"
    """Of the layers. The others are baselines, for which the options of kernels and channels mean nothing."""

    num_layers: int = 6
    """Residual blocks, each around one layer."""

    features: int = 256
    """Width of the model."""

    channels: int = 2
    """Kernels of each feature."""

    bidirectional: bool = False
    """Looks ahead, too: with kernels of its own for that, in long convolutions."""

    butterfly: Literal["causal", "right_angle", "padded"] | None = None
    """Form in which long convolutions learn the blocks of their transforms, too; all but causal look ahead by that."""

    norm: Literal["batch", "layer"] = "batch"
    """Normalisation of each block."""

    prenorm: bool = False
    """Normalises the input of each layer; otherwise, each sum."""

    dropout_rate: float = 0.0
    """Of the activations."""

    kernel_init: Literal["random", "geometric_decay"] = "random"
    """Of the kernels."""

    squash_threshold: float = 0.003
    """Taps below it are zero; the others move towards zero by it. 0 is no squash."""

    smooth_width: int = 1
    """Taps of the moving average of the kernels before the squash, an odd number. 1 is no smoothing."""

    kernel_dropout_rate: float = 0.2
    """Fraction of the taps dropped in each step of training."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation. Parameters stay in float32. The fused kernel rounds float32 to bfloat16."""

    attention: Literal["xla", "cudnn"] | None = None
    """Implementation of a Transformer's attention: cudnn is flash attention, on NVIDIA GPUs, in bfloat16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_layers", "features", "channels"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("squash_threshold", self.squash_threshold >= 0, "at least 0")
        self.require("smooth_width", self.smooth_width >= 1 and self.smooth_width % 2 == 1, "odd and at least 1")
        for name in ("dropout_rate", "kernel_dropout_rate"):
            self.require(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        learned = self.butterfly is not None
        self.require("butterfly", not learned or self.architecture == "long_conv", "None for a baseline")
        contradiction = self.butterfly == "causal" and self.bidirectional
        self.require("butterfly", not contradiction, "right_angle or padded where bidirectional")

    def layer(self) -> functools.partial:
        """What makes the layer of each block."""
        common: dict[str, Any] = {"bidirectional": self.bidirectional}
        match self.architecture:
            case "transformer":
                return functools.partial(LAYERS["transformer"], implementation=self.attention, **common)
            case "s4d":
                return functools.partial(LAYERS["s4d"], implementation=self.implementation, **common)
            case "s5":
                return functools.partial(LAYERS["s5"], **common)
        return functools.partial(
            fb.linen.LongConv,
            channels=self.channels,
            squash_threshold=self.squash_threshold,
            smooth_width=self.smooth_width,
            kernel_dropout_rate=self.kernel_dropout_rate,
            kernel_init=KERNEL_INITS[self.kernel_init],
            implementation=self.implementation,
            butterfly=None if self.butterfly is None else fb.LearnedButterfly(self.butterfly),
            **common,
        )

    def label(self, params: Any) -> Any:
        """Of state-space models, A, B and the time steps train as kernels do."""
        return label_kernels(params)

    def classifier(self, *, num_classes: int, kernel_length: int, **options: Any) -> fb.linen.SequenceClassifier:
        """The model, given what the data decide: `input_features` or `vocab_size`, and the decoder."""
        return fb.linen.SequenceClassifier(
            num_classes=num_classes,
            features=self.features,
            num_layers=self.num_layers,
            kernel_length=kernel_length,
            layer=self.layer(),
            norm=self.norm,
            prenorm=self.prenorm,
            dropout_rate=self.dropout_rate,
            dtype=jnp.dtype(self.dtype),
            **options,
        )
