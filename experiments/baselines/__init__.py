"""Layers of other sequence models, for the same models and training runs as `flashbutterfly_jax.linen.LongConv`.

`LAYERS` names them. Each is a Linen module that `flashbutterfly_jax.linen.SequenceClassifier` takes as its ``layer``,
like `LongConv`, with these arguments in common: ``features``, ``kernel_length``, ``bidirectional``, ``dropout_rate``,
``dtype``, ``param_dtype``, ``precision``, ``deterministic`` and ``name``; others, such as ``state_size``, are bound by
`functools.partial`. The call takes ``x (*B, L, D)`` and, as keywords, ``lengths`` and ``deterministic``.

    >>> import functools, jax, jax.numpy as jnp
    >>> import flashbutterfly_jax as fb
    >>> layer = functools.partial(LAYERS["s4d"], bidirectional=True, state_size=16)
    >>> model = fb.linen.SequenceClassifier(
    ...     num_classes=2, features=8, num_layers=1, kernel_length=64, vocab_size=5, layer=layer
    ... )
    >>> tokens = jnp.zeros((2, 64), int)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> model.apply(variables, tokens, lengths=jnp.array([64, 9])).shape
    (2, 2)

They are trained by AdamW with two learning rates: the parameters that make up a kernel have their own.

    >>> optimizer = fb.optim.adamw(0.01, kernel_learning_rate=0.001, total_steps=100, label=label_kernels)
    >>> state = optimizer.init(variables["params"])
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
from flax import linen as nn
from jaxtyping import PyTree

import flashbutterfly_jax as fb
from experiments.baselines.s4d import S4D as S4D
from experiments.baselines.s5 import S5 as S5
from experiments.baselines.transformer import Transformer as Transformer
from flashbutterfly_jax.optim import Label, label_long_kernels

LAYERS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"long_conv": fb.linen.LongConv, "transformer": Transformer, "s4d": S4D, "s5": S5}
)

_OF_STATE_SPACES = ("log_decay", "frequency", "log_dt", "B")


def label_kernels(params: PyTree) -> PyTree[Label]:
    """The labels of `flashbutterfly_jax.optim.label_long_kernels`, with A, B and time steps of S4D and S5 as kernels.

    Those are what the authors of both train more slowly than the rest, and without decay.

    Example:
      >>> label_kernels({"layer": {"log_dt": 0, "C": 0}})
      {'layer': {'C': 'other', 'log_dt': 'long_kernel'}}
    """

    def label(path, of_long_conv: Label) -> Label:
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        return "long_kernel" if names[-1] in _OF_STATE_SPACES else of_long_conv

    return jax.tree_util.tree_map_with_path(label, label_long_kernels(params))
