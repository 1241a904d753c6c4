"""Flax Linen modules. `flashbutterfly_jax.nnx` has the same layers and models, with the same parameter trees.

Language models are written in Linen; `flashbutterfly_jax.nnx.LanguageModel` bridges them.
"""

from flashbutterfly_jax.linen.attention import CausalAttention as CausalAttention
from flashbutterfly_jax.linen.butterfly import ButterflyDense as ButterflyDense
from flashbutterfly_jax.linen.butterfly import ButterflyFilter as ButterflyFilter
from flashbutterfly_jax.linen.butterfly import ButterflyMLP as ButterflyMLP
from flashbutterfly_jax.linen.classifier import SequenceClassifier as SequenceClassifier
from flashbutterfly_jax.linen.filters import DiagonalFilter as DiagonalFilter
from flashbutterfly_jax.linen.filters import LongFilter as LongFilter
from flashbutterfly_jax.linen.filters import ShiftFilter as ShiftFilter
from flashbutterfly_jax.linen.h3 import H3 as H3
from flashbutterfly_jax.linen.h3 import H3LongConv as H3LongConv
from flashbutterfly_jax.linen.image import ImageClassifier as ImageClassifier
from flashbutterfly_jax.linen.language import MLP as MLP
from flashbutterfly_jax.linen.language import LanguageBlock as LanguageBlock
from flashbutterfly_jax.linen.language import LanguageModel as LanguageModel
from flashbutterfly_jax.linen.long_conv import LongConv as LongConv
from flashbutterfly_jax.linen.long_conv_2d import LongConv2D as LongConv2D
from flashbutterfly_jax.linen.residual import ResidualBlock as ResidualBlock
