"""Long convolution by the fused butterfly kernel for Hopper GPUs: the `Backend` of ``implementation="mosaic_gpu"``."""

import functools

from flashbutterfly_jax.functional.fused import long_conv_fused

long_conv_mosaic_gpu = functools.partial(long_conv_fused, "pallas_kernels.fft_conv:fft_conv")
