"""The language model for users of NNX: the Linen one, bridged."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from flashbutterfly_jax import linen


def LanguageModel(*, rngs: nnx.Rngs, **arguments: Any) -> nnx.bridge.ToNNX:
    """A `flashbutterfly_jax.linen.LanguageModel` as an NNX module, with the same arguments and parameters.

    It is called like the Linen module. The variables of generation are ``{"params": ...}`` of its state.

    Args:
      rngs: streams ``params`` and, where there is dropout, ``dropout``.
      **arguments: of the Linen module; mixers are Linen modules too.

    Example:
      >>> import functools, jax.numpy as jnp
      >>> from flax import nnx
      >>> import flashbutterfly_jax as fb
      >>> mixer = functools.partial(fb.linen.H3LongConv, kernel_length=32)
      >>> model = fb.nnx.LanguageModel(vocab_size=50, features=8, num_layers=1, mixer=mixer, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 16), int)).shape
      (2, 16, 50)
    """
    module = nnx.bridge.ToNNX(linen.LanguageModel(**arguments), rngs=rngs)
    return nnx.bridge.lazy_init(module, jnp.zeros((1, 1), jnp.int32), deterministic=True)
