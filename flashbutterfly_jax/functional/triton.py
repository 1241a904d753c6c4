"""Long convolution by the fused butterfly in Triton, for NVIDIA GPUs of compute capability 8.0 and newer.

It is the `Backend` of ``implementation="triton"``.
"""

import functools

from flashbutterfly_jax.functional.fused import long_conv_fused

long_conv_triton = functools.partial(long_conv_fused, "pallas_kernels.fft_conv.triton_api:fft_conv_triton")
