"""Linen and NNX are one library: the same trees, the same bits, and Flax's bridges between them."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flashbutterfly_jax as fb
from tests.layers.modules import fill, variables_of

D, K = 6, 32
X = np.random.default_rng(0).normal(size=(2, 32, D)).astype(np.float32)
LENGTHS = jnp.array([7, 32])

LAYERS = {
    "causal": {},
    "bidirectional": {"bidirectional": True, "channels": 3},
    "regularised": {"smooth_width": 3, "squash_threshold": 0.001, "kernel_dropout_rate": 0.2, "dropout_rate": 0.1},
    "transformed": {"kernel_transform": jnp.tanh},
    "bfloat16": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
}
MODELS = {
    "pixels": {"input_features": D},
    "prenorm": {"input_features": D, "prenorm": True, "norm": "batch", "dropout_rate": 0.1},
    "batch": {"input_features": D, "norm": "batch"},
    "last": {"input_features": D, "decoder": "last", "norm": "batch", "dtype": jnp.bfloat16},
    "bfloat16": {"input_features": D, "dtype": jnp.bfloat16},
    "tokens": {"vocab_size": 9, "tie_dropout": False, "dropout_rate": 0.5},
    "retrieval": {"vocab_size": 9, "decoder": "retrieval"},
}


def layer_arguments(case):
    return {"features": D, "kernel_length": K, **LAYERS[case]}


def model_arguments(case, api):
    layer = functools.partial(getattr(fb, api).LongConv, kernel_init=fb.initializers.random(0.1))
    return {"num_classes": 3, "features": 4, "num_layers": 2, "kernel_length": K, "layer": layer, **MODELS[case]}


def layers(case):
    """The Linen layer, the NNX layer, an input and its lengths."""
    arguments = layer_arguments(case)
    return fb.linen.LongConv(**arguments), fb.nnx.LongConv(**arguments, rngs=nnx.Rngs(0)), jnp.asarray(X), LENGTHS


def models(case):
    """The Linen model, the NNX model, an input and its lengths."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 9, (2, 2, 32)))
    x = tokens if case == "retrieval" else tokens[0] if case == "tokens" else jnp.asarray(X)
    lengths = jnp.stack([LENGTHS, LENGTHS]) if case == "retrieval" else LENGTHS
    linen = fb.linen.SequenceClassifier(**model_arguments(case, "linen"))
    return linen, fb.nnx.SequenceClassifier(**model_arguments(case, "nnx"), rngs=nnx.Rngs(0)), x, lengths


CASES = [pytest.param(layers, case, id=f"layer-{case}") for case in LAYERS]
CASES += [pytest.param(models, case, id=f"model-{case}") for case in MODELS]


@pytest.mark.parametrize(("make", "case"), CASES)
def test_one_tree_gives_the_same_bits(make, case):
    linen, other, x, lengths = make(case)
    variables = fill(jax.eval_shape(lambda: linen.init(jax.random.key(0), x, deterministic=True)))
    assert jax.tree.map(describe, variables_of(other)) == jax.tree.map(describe, variables)
    for part in variables.values():
        nnx.update(other, part)
    for given in (None, lengths):
        want = linen.apply(variables, x, lengths=given, deterministic=True)
        got = other(x, lengths=given, deterministic=True)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_batch_statistics_move_alike():
    linen, other, x, _ = models("batch")
    variables = fill(jax.eval_shape(lambda: linen.init(jax.random.key(0), x, deterministic=True)))
    for part in variables.values():
        nnx.update(other, part)
    want, updates = linen.apply(variables, x, deterministic=False, mutable=["batch_stats"])
    np.testing.assert_array_equal(other(x), want)
    moved = variables_of(other)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, moved, updates["batch_stats"])
    assert np.abs(moved["blocks"]["norm"]["mean"]).max() > 0


BRIDGED = [case for case in CASES if case.id in ("layer-causal", "layer-regularised", "model-prenorm")]


@pytest.mark.parametrize(("make", "case"), BRIDGED)
def test_bridge_to_nnx(make, case):
    linen, _, x, lengths = make(case)
    bridged = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x, deterministic=True)
    want = linen.apply(variables_of(bridged), x, lengths=lengths, deterministic=True)
    np.testing.assert_array_equal(bridged(x, lengths=lengths, deterministic=True), want)


@pytest.mark.parametrize(("make", "case"), BRIDGED)
def test_bridge_to_linen(make, case):
    linen, _, x, lengths = make(case)
    name, arguments = (
        ("LongConv", layer_arguments(case)) if make is layers else ("SequenceClassifier", model_arguments(case, "nnx"))
    )
    bridged = nnx.bridge.to_linen(getattr(fb.nnx, name), **arguments)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = nn.meta.unbox(bridged.init(rngs, x, deterministic=True))
    native = jax.eval_shape(lambda: linen.init(rngs, x, deterministic=True))
    assert jax.tree.map(describe, variables["params"]) == jax.tree.map(describe, native["params"])
    got = bridged.apply(variables, x, lengths=lengths, deterministic=True, rngs=rngs)
    kept = {name: variables[name] for name in native}
    np.testing.assert_array_equal(got, linen.apply(kept, x, lengths=lengths, deterministic=True))


@pytest.mark.parametrize("name", ["LongConv", "ResidualBlock", "SequenceClassifier"])
def test_arguments_have_the_same_names_order_and_defaults(name):
    linen = dict(inspect.signature(getattr(fb.linen, name)).parameters)
    other = dict(inspect.signature(getattr(fb.nnx, name).__init__).parameters)
    del linen["parent"], linen["name"], other["self"], other["rngs"]
    assert list(linen) == list(other)
    for argument in set(linen) - {"deterministic", "layer"}:
        assert linen[argument].default == other[argument].default, argument


def describe(leaf):
    return leaf.shape, leaf.dtype
