"""Pure functions of arrays: no Flax, no state."""

from flashbutterfly_jax.functional.long_conv import long_conv as long_conv
from flashbutterfly_jax.functional.regularize import kernel_dropout as kernel_dropout
from flashbutterfly_jax.functional.regularize import smooth as smooth
from flashbutterfly_jax.functional.regularize import smooth_frequency as smooth_frequency
from flashbutterfly_jax.functional.regularize import squash as squash
