"""Learned butterflies longer than a tile: values and every cotangent, interpreted, and what is lowered for a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashbutterfly_jax import LearnedButterfly, learned_long_conv
from pallas_kernels.fft_conv.config import BLOCK, N1
from tests.kernels.test_learned import relative_error, run
from tests.kernels.test_lowering import kernels, lowered
from tests.tolerances import FUSED


def problem(m, length, taps, batch, features, dtype):
    """Inputs, with blocks as far from the DFT as their entries are large, and in float64 the result and cotangents."""
    random = np.random.default_rng(0)
    butterfly = LearnedButterfly("right_angle", (m, N1, N1), per_stage=True, learn_inverse=True)
    with jax.enable_x64(True):
        blocks = butterfly.init(jax.random.key(0), features, m * BLOCK, "float64")
        blocks = jax.tree.map(lambda block: block + 0.5 * random.standard_normal(block.shape), blocks)
        u, g = (jnp.asarray(random.standard_normal((batch, features, length)), dtype) for _ in range(2))
        kernel = random.standard_normal((features, taps)).astype(np.float32)

        def convolve(u, kernel, blocks):
            return learned_long_conv(u, kernel, blocks=blocks, butterfly=butterfly)

        want, vjp = jax.vjp(convolve, u.astype("float64"), kernel.astype("float64"), blocks)
        want = jax.tree.map(np.asarray, (want, vjp(g.astype("float64"))))
        arguments = u, jnp.asarray(kernel), jax.tree.map(lambda block: block.astype("float32"), blocks)
    return arguments, g, butterfly, want
