"""What the layers and models compute, as pure functions that `flashbutterfly_jax.linen` and `.nnx` share."""

from flashbutterfly_jax.models.generation import choose as choose
from flashbutterfly_jax.models.generation import generate as generate
from flashbutterfly_jax.models.generation import stream as stream
from flashbutterfly_jax.models.language import SIZES as SIZES
from flashbutterfly_jax.models.layer import check_long_conv as check_long_conv
from flashbutterfly_jax.models.layer import convolve_channels as convolve_channels
from flashbutterfly_jax.models.layer import regularize_kernel as regularize_kernel
from flashbutterfly_jax.models.layer import uniform_fan_in as uniform_fan_in
from flashbutterfly_jax.models.pooling import pair_features as pair_features
from flashbutterfly_jax.models.pooling import pool as pool
