"""The butterfly transform and the convolution on it, stage by stage: what every kernel's values are checked against."""

from flashbutterfly_jax.functional.butterfly.blocks import Blocks as Blocks
from flashbutterfly_jax.functional.butterfly.blocks import block_shapes as block_shapes
from flashbutterfly_jax.functional.butterfly.blocks import init_blocks as init_blocks
from flashbutterfly_jax.functional.butterfly.blocks import stage_blocks as stage_blocks
from flashbutterfly_jax.functional.butterfly.chain import Chain as Chain
from flashbutterfly_jax.functional.butterfly.chain import learned_reference_backward as learned_reference_backward
from flashbutterfly_jax.functional.butterfly.chain import learned_reference_forward as learned_reference_forward
from flashbutterfly_jax.functional.butterfly.chain import learned_reference_spectrum as learned_reference_spectrum
from flashbutterfly_jax.functional.butterfly.chain import (
    learned_reference_spectrum_backward as learned_reference_spectrum_backward,
)
from flashbutterfly_jax.functional.butterfly.convolution import RIGHT_ANGLE as RIGHT_ANGLE
from flashbutterfly_jax.functional.butterfly.convolution import conv_forward as conv_forward
from flashbutterfly_jax.functional.butterfly.convolution import input_gradient as input_gradient
from flashbutterfly_jax.functional.butterfly.convolution import kernel_gradient as kernel_gradient
from flashbutterfly_jax.functional.butterfly.convolution import kernel_spectrum as kernel_spectrum
from flashbutterfly_jax.functional.butterfly.convolution import long_conv_butterfly as long_conv_butterfly
from flashbutterfly_jax.functional.butterfly.learned import LearnedButterfly as LearnedButterfly
from flashbutterfly_jax.functional.butterfly.learned import learned_long_conv as learned_long_conv
from flashbutterfly_jax.functional.butterfly.linear import butterfly_linear as butterfly_linear
from flashbutterfly_jax.functional.butterfly.linear import init_diagonal as init_diagonal
from flashbutterfly_jax.functional.butterfly.linear import init_linear_blocks as init_linear_blocks
from flashbutterfly_jax.functional.butterfly.linear import linear_plan as linear_plan
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
