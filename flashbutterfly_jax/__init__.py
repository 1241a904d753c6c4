"""Long convolutions for sequence modeling in JAX and Flax.

The functional core needs no Flax. The parts that do are loaded on first use: `flashbutterfly_jax.linen`,
`flashbutterfly_jax.nnx`, `flashbutterfly_jax.models`, `flashbutterfly_jax.optim`, `flashbutterfly_jax.interop`.
"""

import importlib as _importlib
from typing import TYPE_CHECKING

from flashbutterfly_jax import functional as functional
from flashbutterfly_jax import initializers as initializers
from flashbutterfly_jax.functional import LearnedButterfly as LearnedButterfly
from flashbutterfly_jax.functional import kernel_dropout as kernel_dropout
from flashbutterfly_jax.functional import learned_long_conv as learned_long_conv
from flashbutterfly_jax.functional import long_conv as long_conv
from flashbutterfly_jax.functional import long_conv_2d as long_conv_2d
from flashbutterfly_jax.functional import long_conv_on_mesh as long_conv_on_mesh
from flashbutterfly_jax.functional import long_conv_stream as long_conv_stream
from flashbutterfly_jax.functional import sequence_parallel_long_conv as sequence_parallel_long_conv
from flashbutterfly_jax.functional import smooth as smooth
from flashbutterfly_jax.functional import smooth_frequency as smooth_frequency
from flashbutterfly_jax.functional import squash as squash

if TYPE_CHECKING:
    from flashbutterfly_jax import interop as interop
    from flashbutterfly_jax import linen as linen
    from flashbutterfly_jax import models as models
    from flashbutterfly_jax import nnx as nnx
    from flashbutterfly_jax import optim as optim

_ON_FIRST_USE = ("interop", "linen", "models", "nnx", "optim")


def __getattr__(name: str):
    if name in _ON_FIRST_USE:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ON_FIRST_USE])
