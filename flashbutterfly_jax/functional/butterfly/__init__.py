"""The butterfly transform and the convolution on it, stage by stage: what every kernel's values are checked against."""

from flashbutterfly_jax.functional.butterfly.convolution import RIGHT_ANGLE as RIGHT_ANGLE
from flashbutterfly_jax.functional.butterfly.convolution import conv_forward as conv_forward
from flashbutterfly_jax.functional.butterfly.convolution import input_gradient as input_gradient
from flashbutterfly_jax.functional.butterfly.convolution import kernel_gradient as kernel_gradient
from flashbutterfly_jax.functional.butterfly.convolution import kernel_spectrum as kernel_spectrum
from flashbutterfly_jax.functional.butterfly.convolution import long_conv_butterfly as long_conv_butterfly
from flashbutterfly_jax.functional.butterfly.plans import Plan as Plan
from flashbutterfly_jax.functional.butterfly.plans import fast_plan as fast_plan
from flashbutterfly_jax.functional.butterfly.plans import plan as plan
from flashbutterfly_jax.functional.butterfly.transform import dft_block as dft_block
from flashbutterfly_jax.functional.butterfly.transform import dft_blocks as dft_blocks
from flashbutterfly_jax.functional.butterfly.transform import forward as forward
from flashbutterfly_jax.functional.butterfly.transform import forward_stage as forward_stage
from flashbutterfly_jax.functional.butterfly.transform import inverse as inverse
from flashbutterfly_jax.functional.butterfly.transform import inverse_dft_blocks as inverse_dft_blocks
from flashbutterfly_jax.functional.butterfly.transform import inverse_stage as inverse_stage
from flashbutterfly_jax.functional.butterfly.transform import twiddle as twiddle
