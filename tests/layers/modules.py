"""Both APIs behind one face, so that one test holds for both."""

import jax
from flax import nnx

import flashbutterfly_jax as fb

APIS = ("linen", "nnx")


class Model:
    """A module of either API: its variables and a pure ``apply``."""

    def __init__(self, api, name, x, seed=0, **arguments):
        self.api = api
        if api == "linen":
            self.module = getattr(fb.linen, name)(**arguments)
            rngs = {"params": jax.random.key(seed), "dropout": jax.random.key(seed + 1)}
            self.variables = self.module.init(rngs, x, deterministic=True)
        else:
            self.module = getattr(fb.nnx, name)(**arguments, rngs=nnx.Rngs(params=seed, dropout=seed + 1))
            state = {"params": nnx.state(self.module, nnx.Param), "batch_stats": nnx.state(self.module, nnx.BatchStat)}
            self.variables = {name: nnx.to_pure_dict(part) for name, part in state.items() if part}

    @property
    def params(self):
        return self.variables["params"]

    def __call__(self, x, params=None, *, deterministic=True, key=0, **inputs):
        variables = self.variables if params is None else {**self.variables, "params": params}
        if self.api == "linen":
            rngs = {"dropout": jax.random.key(key)}
            apply = self.module.apply
            if deterministic:
                return apply(variables, x, deterministic=True, **inputs)
            return apply(variables, x, deterministic=False, rngs=rngs, mutable=["batch_stats"], **inputs)[0]
        module = nnx.clone(self.module)
        for part in variables.values():
            nnx.update(module, part)
        nnx.reseed(module, policy="match_shape", dropout=key)
        return module(x, deterministic=deterministic, **inputs)
