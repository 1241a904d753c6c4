"""The options of language models, and the sets of them that `experiments.language.train` knows by name."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from rich.console import Console

import flashbutterfly_jax as fb
from experiments.common.task import Batch, Measure, Recipe, Task
from experiments.language.corpus import Corpus, corpus_of, standard_library
from experiments.language.flop import training_flop
from experiments.language.tokenizers import make_tokenizer
from experiments.language.tokens import Tokens, Windows
from flashbutterfly_jax.initializers import ScaledInitializer
from flashbutterfly_jax.models.language import Size

type Mixer = Literal["h3_long_conv", "h3", "attention"]
type Mlp = Literal["dense", "butterfly"]

KERNEL_INITS: dict[str, ScaledInitializer] = {
    "random": fb.initializers.random(),
    "geometric_decay": fb.initializers.geometric_decay(),
}


def predict(model: nn.Module, batch: Batch, deterministic: bool) -> jax.Array:
    """The logits of the label of every input."""
    return model(batch["inputs"], deterministic=deterministic)


def next_token(logits: jax.Array, batch: Batch) -> dict[str, Measure]:
    """Cross-entropy in nats of each token."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return {"loss": Measure(losses.sum(-1), jnp.full(losses.shape[0], float(losses.shape[1])))}


@dataclass(frozen=True, kw_only=True)
class Language(Recipe):
    """Train a language model on text: H3 with long convolutions, H3 itself, or a Transformer, by the same loop.

    The task `stdlib` needs no data: its text are the source files of the installed Python's standard library, its
    tokens bytes. `wikitext` and `text` read files from --path. The preset `small` takes minutes on two CPU cores.
    Presets named like sizes have the recipe of the H3 models on the Pile, of HazyResearch/safari in
    configs/experiment/pile: for GPUs, and not run here.
    """

    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 3e-3
    kernel_learning_rate: float | None = None
    weight_decay: float = 0.1
    warmup_steps: int = 30
    final_fraction: float = 0.1
    clip_norm: float | None = 1.0
    log_every: int = 20
    evaluate_every: int = 200
    checkpoint_every: int = 200

    path: Path | None = None
    """File or folder of text, parquet or JSON lines. Files named train, valid(ation) and test are the splits."""

    suffixes: tuple[str, ...] = ()
    """Of the files of the folder that are read, such as .txt; none reads all."""

    separate: bool = True
    """Puts a token between documents: files, and rows of parquet and JSON lines."""

    tokenizer: Path | None = None
    """A tokenizer.json; None takes bytes."""

    data_dir: Path = Path("data")
    """Where tokens are kept."""

    length: int = 512
    """Tokens of a training example, and taps of the long kernels."""

    evaluation_windows: int = 64
    """Of that length, at most, on which evaluations during training are made; the exact perplexity comes in the end."""

    mixer: Mixer = "h3_long_conv"
    """Of the steps, in every layer but those of attention."""

    butterfly: Literal["causal"] | None = None
    """Learns the blocks of the long convolutions' transforms, too, in the form that never looks ahead."""

    mlp: Mlp = "dense"
    """The mixer of features, in every layer: dense matrices, or learned butterflies in their place."""

    features: int = 128
    """Width of the model."""

    num_layers: int = 4
    """Each of a mixer and an MLP."""

    num_heads: int = 4
    """Of attention."""

    attention_layers: tuple[int, ...] = (1,)
    """Layers, counted from 0, that have attention instead of the mixer."""

    rotary: bool = False
    """Turns queries and keys of attention by their positions; nothing else tells a Transformer where they are."""

    init_scale: float = 0.02
    """Standard deviation of the weights."""

    kernel_init: Literal["random", "geometric_decay"] = "geometric_decay"
    """Of the long kernels."""

    squash_threshold: float = 0.001
    """Taps below it are zero; the others move towards zero by it."""

    kernel_dropout_rate: float = 0.0
    """Fraction of the taps dropped in each step of training."""

    embedding_dropout_rate: float = 0.0
    """Of the embedded tokens."""

    attention_dropout_rate: float = 0.0
    """Of the weights of attention."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation. Parameters, the residual stream, logits and the optimizer stay in float32."""

    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but products with weights, or all within a layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "evaluation_windows", "features", "num_layers", "num_heads"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("kernel_dropout_rate", "embedding_dropout_rate", "attention_dropout_rate"):
            self.require(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self.require("squash_threshold", self.squash_threshold >= 0, "at least 0")
        self.require("num_heads", self.features % self.num_heads == 0, f"a divisor of features = {self.features}")
        inside = all(0 <= layer < self.num_layers for layer in self.attention_layers)
        self.require("attention_layers", inside, f"from 0 to {self.num_layers - 1}")
        learnable = self.butterfly is None or self.mixer == "h3_long_conv"
        self.require(
            "butterfly", learnable, f"None for the mixer {self.mixer}, which has no long convolutions to learn"
        )

    @property
    def whereabouts(self) -> tuple[str, ...]:
        return ("path", "data_dir", *super().whereabouts)

    def corpus(self) -> Corpus:
        """The text.

        Raises:
          ValueError: if there is none at the path.
        """
        return standard_library() if self.path is None else corpus_of(self.path, self.suffixes)

    def tokens(self) -> Tokens:
        """The tokens of the text, made the first time.

        Raises:
          ValueError: as `Tokens.of` does.
        """
        tokenizer = make_tokenizer(self.tokenizer)
        return Tokens.of(self.corpus(), tokenizer, self.data_dir, separate=self.separate, console=Console())

    def build(self) -> Task:
        tokens = self.tokens()
        train = grain.MapDataset.source(Windows(tokens["train"], self.length)).seed(self.seed).shuffle()
        evaluation = {
            name: grain.MapDataset.source(Windows(tokens[name], self.length, self.evaluation_windows))
            for name in ("validation", "test")
        }
        return Task(
            self.model(tokens.vocab_size),
            train,
            evaluation,
            forward=predict,
            measure=next_token,
            score="loss",
            tokens_per_example=self.length,
            flop_per_example=None if self.learns_butterflies else training_flop(self, tokens.vocab_size),
        )

    @property
    def learns_butterflies(self) -> bool:
        """Whose operations are not counted."""
        return self.butterfly is not None or self.mlp == "butterfly"

    def model(self, vocab_size: int) -> fb.linen.LanguageModel:
        """The model for a vocabulary, which is filled up to a multiple of 8."""
        everywhere = self.mixer == "attention"
        return fb.linen.LanguageModel(
            vocab_size=-(-vocab_size // 8) * 8,
            features=self.features,
            num_layers=self.num_layers,
            mixer=self._mixer(),
            attention_layers=tuple(range(self.num_layers)) if everywhere else self.attention_layers,
            num_heads=self.num_heads,
            attention=functools.partial(
                fb.linen.CausalAttention, rotary=self.rotary, dropout_rate=self.attention_dropout_rate
            ),
            mlp=fb.linen.ButterflyMLP if self.mlp == "butterfly" else fb.linen.MLP,
            init_scale=self.init_scale,
            embedding_dropout_rate=self.embedding_dropout_rate,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
        )

    def _mixer(self) -> functools.partial:
        if self.mixer == "h3":
            return functools.partial(fb.linen.H3, implementation=self.implementation)
        return functools.partial(
            fb.linen.H3LongConv,
            kernel_length=self.length,
            squash_threshold=self.squash_threshold,
            kernel_dropout_rate=self.kernel_dropout_rate,
            kernel_init=KERNEL_INITS[self.kernel_init],
            butterfly=None if self.butterfly is None else fb.LearnedButterfly(self.butterfly),
            implementation=self.implementation,
        )


def paper(size: Size, mixer: Mixer = "h3_long_conv", **changes: Any) -> Language:
    """The released recipe of a size: 10,000 steps of 2,048 tokens, the short run of 5 billion tokens for 125M."""
    arguments = {
        **size.arguments,
        "mixer": mixer,
        "rotary": mixer == "attention",
        "steps": 10_000,
        "batch_size": size.batch_size,
        "learning_rate": size.learning_rate,
        "warmup_steps": 100,
        "length": 2048,
        "kernel_init": "random",
        "squash_threshold": 0.003,
        "kernel_dropout_rate": 0.2,
        "embedding_dropout_rate": 0.1,
        "attention_dropout_rate": 0.1,
        "dtype": "bfloat16",
        "remat": "dots",
        "evaluate_every": 1000,
        "checkpoint_every": 1000,
        **changes,
    }
    return Language(**arguments)


SMALL = Language()
COMPARISON = replace(
    SMALL,
    steps=400,
    warmup_steps=24,
    features=96,
    num_layers=2,
    length=256,
    log_every=10,
    evaluate_every=100,
    checkpoint_every=50,
)
SMOKE = replace(SMALL, steps=6, batch_size=4, length=64, features=16, warmup_steps=1, evaluation_windows=4, log_every=2)

PRESETS: dict[str, Language] = {
    "small": SMALL,
    "small-h3": replace(SMALL, mixer="h3"),
    "small-transformer": replace(SMALL, mixer="attention", rotary=True),
    "comparison": COMPARISON,
    "smoke": replace(SMOKE, evaluate_every=4, checkpoint_every=2),
    **{name: paper(size) for name, size in fb.models.SIZES.items()},
    "125M-h3": paper(fb.models.SIZES["125M"], "h3"),
    "125M-transformer": paper(fb.models.SIZES["125M"], "attention"),
}
