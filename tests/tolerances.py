"""Every tolerance of a long convolution, each beside the largest error measured over the cases of `tests.parity`.

Errors are relative to the largest value of the array: max |got - want| / max |want|, want in float64.
"""

# implementation -> dtype of the result (that of u) -> tolerance. The kernel is float32 where u has 16 bits.
FORWARD = {
    "xla": {
        "float64": 5e-15,  # 5.6e-16
        "float32": 1e-6,  # 2.9e-7
        "bfloat16": 4e-3,  # 3.0e-3; half a unit in the last place is 3.9e-3 of the smallest number of a binade
        "float16": 5e-4,  # 3.9e-4; likewise 4.9e-4
    },
    "butterfly": {
        "float64": 5e-15,  # 1.6e-15
        "float32": 1e-6,  # 3.3e-7
        "bfloat16": 4e-3,  # 3.0e-3
        "float16": 5e-4,  # 3.9e-4
    },
}

# implementation -> dtype of the gradient (that of its argument) -> tolerance
GRADIENT = {
    "xla": {
        "float64": 5e-15,  # 7.1e-16
        "float32": 1e-6,  # 4.2e-7
        "bfloat16": 4e-3,  # 3.4e-3
        "float16": 5e-4,  # 3.7e-4
    },
    "butterfly": {
        "float64": 6e-15,  # 2.1e-15
        "float32": 2e-6,  # 7.8e-7
        "bfloat16": 4e-3,  # 3.4e-3
        "float16": 5e-4,  # 4.4e-4
    },
}

# A layer, or a model of two, against its transcription in float64: dtype -> tolerance
LAYER = {
    "float64": 5e-15,  # 6.6e-16
    "float32": 1e-6,  # 2.9e-7
    "bfloat16": 1.5e-2,  # 8.4e-3, the largest value being of order 1
}

# The fused kernel, in relative L2 norm, results and gradients alike: dtype that it computes in -> tolerance
FUSED = {
    "bfloat16": 7e-3,  # 5.1e-3
    "float16": 2.5e-3,  # 7.0e-4
}

# Likewise with learned blocks in three passes, between which Z and W are rounded too
LEARNED_LONG = {
    "bfloat16": 1.1e-2,  # 8.5e-3, of a block of 2 points; 6.6e-3 of all else
    "float16": 2.5e-3,  # 1.3e-3
}
