"""Pure functions of arrays: no Flax, no state."""

from flashbutterfly_jax.functional.butterfly.learned import LearnedButterfly as LearnedButterfly
from flashbutterfly_jax.functional.butterfly.learned import learned_long_conv as learned_long_conv
from flashbutterfly_jax.functional.diagnostics import high_frequency_share as high_frequency_share
from flashbutterfly_jax.functional.diagnostics import total_variation as total_variation
from flashbutterfly_jax.functional.distributed import long_conv_on_mesh as long_conv_on_mesh
from flashbutterfly_jax.functional.distributed import sequence_parallel_long_conv as sequence_parallel_long_conv
from flashbutterfly_jax.functional.long_conv import long_conv as long_conv
from flashbutterfly_jax.functional.long_conv_2d import long_conv_2d as long_conv_2d
from flashbutterfly_jax.functional.regularize import kernel_dropout as kernel_dropout
from flashbutterfly_jax.functional.regularize import smooth as smooth
from flashbutterfly_jax.functional.regularize import smooth_frequency as smooth_frequency
from flashbutterfly_jax.functional.regularize import squash as squash
from flashbutterfly_jax.functional.stream import LongConvStream as LongConvStream
from flashbutterfly_jax.functional.stream import StreamState as StreamState
from flashbutterfly_jax.functional.stream import long_conv_stream as long_conv_stream
