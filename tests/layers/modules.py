"""Both APIs behind one face, so that one test holds for both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flashbutterfly_jax as fb

APIS = ("linen", "nnx")


class Model:
    """A module of either API, its variables and a pure call.

    The variables are not the initial ones: none is 0 or 1, so that none can be forgotten unnoticed, and Linen's
    initialisation, which compiles for a second, is not run.
    """

    def __init__(self, api, name, x, **arguments):
        self.api = api
        if api == "linen":
            self.module = getattr(fb.linen, name)(**arguments)
            shapes = jax.eval_shape(lambda: self.module.init(jax.random.key(0), x, deterministic=True))
        else:
            self.module = getattr(fb.nnx, name)(**arguments, rngs=nnx.Rngs(params=0, dropout=1))
            shapes = variables_of(self.module)
        self.variables = fill(shapes)

    @property
    def params(self):
        return self.variables["params"]

    def __call__(self, x, params=None, *, deterministic=True, key=0, **inputs):
        variables = self.variables if params is None else {**self.variables, "params": params}
        state = None if self.api == "linen" else nnx.state(self.module)
        return self._compiled(variables, state, x, key, inputs, deterministic=deterministic)

    @functools.cached_property
    def _compiled(self):
        """The call as one program: one for each operation takes three times as long to compile."""
        return jax.jit(self._call, static_argnames="deterministic")

    def _call(self, variables, state, x, key, inputs, *, deterministic):
        if self.api == "linen":
            rngs = {"dropout": jax.random.key(key)}
            inputs = inputs | {"deterministic": deterministic, "rngs": rngs, "mutable": ["batch_stats"]}
            return self.module.apply(variables, x, **inputs)[0]
        module = nnx.merge(nnx.graphdef(self.module), state)
        for part in variables.values():
            nnx.update(module, part)
        nnx.reseed(module, policy="match_shape", dropout=jax.random.key(key))
        return module(x, deterministic=deterministic, **inputs)


def variables_of(module):
    """The variables of an NNX module as those of a Linen module."""
    parts = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    state = {name: nnx.to_pure_dict(nnx.state(module, part)) for name, part in parts.items()}
    return {name: tree for name, tree in state.items() if tree}


def fill(shapes):
    """Random values of these shapes; positive ones for variances."""
    rng = np.random.default_rng(0)

    def value(path, leaf):
        values = 0.3 * rng.normal(size=leaf.shape)
        values = 1 + np.abs(values) if path[-1].key == "var" else values
        return jnp.asarray(values + (path[-1].key == "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)
