"""Long convolution by a fused butterfly on the tensor cores."""

from pallas_kernels.fft_conv.api import fft_conv as fft_conv
from pallas_kernels.fft_conv.outer_plan import LONGEST as LONGEST
