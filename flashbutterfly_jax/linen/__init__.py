"""Flax Linen modules. `flashbutterfly_jax.nnx` has the same names, arguments and parameter trees."""

from flashbutterfly_jax.linen.classifier import SequenceClassifier as SequenceClassifier
from flashbutterfly_jax.linen.long_conv import LongConv as LongConv
from flashbutterfly_jax.linen.residual import ResidualBlock as ResidualBlock
