"""Flax NNX modules. `flashbutterfly_jax.linen` has the same names, arguments and parameter trees."""

from flashbutterfly_jax.nnx.butterfly import ButterflyDense as ButterflyDense
from flashbutterfly_jax.nnx.butterfly import ButterflyMLP as ButterflyMLP
from flashbutterfly_jax.nnx.classifier import SequenceClassifier as SequenceClassifier
from flashbutterfly_jax.nnx.image import ImageClassifier as ImageClassifier
from flashbutterfly_jax.nnx.language import LanguageModel as LanguageModel
from flashbutterfly_jax.nnx.long_conv import LongConv as LongConv
from flashbutterfly_jax.nnx.long_conv_2d import LongConv2D as LongConv2D
from flashbutterfly_jax.nnx.residual import ResidualBlock as ResidualBlock
