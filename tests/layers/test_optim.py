"""The optimiser against constants worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flashbutterfly_jax as fb
from flashbutterfly_jax.optim import adamw, label_long_kernels, warmup_cosine

PARAMS = {"layer": {"kernel": jnp.array([2.0]), "skip": jnp.array([2.0]), "output": {"kernel": jnp.array([2.0])}}}


def steps(optimizer, gradients, params=PARAMS):
    """The parameters after each gradient, which is the same for all of them."""
    state, history = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(
            jax.tree.map(lambda p, g=gradient: jnp.full_like(p, g), params), state, params
        )
        params = optax.apply_updates(params, updates)
        history.append({"kernel": params["layer"]["kernel"][0], "skip": params["layer"]["skip"][0]})
        np.testing.assert_array_equal(params["layer"]["output"]["kernel"], params["layer"]["skip"])
    return {name: np.array([row[name] for row in history]) for name in ("kernel", "skip")}


def test_two_steps_by_hand():
    """Steps 0 and 1 of 4 have factors 1 and (1 + cos(pi / 4)) / 2 = 0.8535534.

    Gradients 3 then -1. Step 0: m / sqrt(v) = 1 exactly. Step 1: m = (0.9 * 0.3 - 0.1) / 0.19 = 0.8947368,
    v = (0.999 * 0.009 + 0.001) / 0.001999 = 4.9979990, m / sqrt(v) = 0.4002203.
    """
    got = steps(adamw(0.1, kernel_learning_rate=0.01, weight_decay=0.5, total_steps=4), [3.0, -1.0])
    kernel = [2 - 0.01, 2 - 0.01 - 0.01 * 0.8535534 * 0.4002203]
    first = 2 - 0.1 * (1 + 0.5 * 2)
    skip = [first, first - 0.1 * 0.8535534 * (0.4002203 + 0.5 * first)]
    np.testing.assert_allclose(got["kernel"], kernel, rtol=1e-6)  # 6.8e-7: 1 - 0.999 in float32
    np.testing.assert_allclose(got["skip"], skip, rtol=1e-6)  # 6.8e-7: 1 - 0.999 in float32


def test_kernel_rate_of_none_is_the_global_one_without_decay():
    got = steps(adamw(0.1, weight_decay=0.5, total_steps=4), [3.0])
    np.testing.assert_allclose(
        [got["kernel"][0], got["skip"][0]], [1.9, 1.8], rtol=1e-6
    )  # 6.8e-7: 1 - 0.999 in float32


def test_kernel_rate_of_zero_freezes():
    optimizer = adamw(0.1, kernel_learning_rate=0.0, total_steps=4)
    got = steps(optimizer, [3.0, 3.0])
    assert (got["kernel"] == 2).all()
    assert (got["skip"] < 2).all()
    moments = [leaf for leaf in jax.tree.leaves(optimizer.init(PARAMS)) if leaf.ndim]
    assert len(moments) == 4  # two for each of the two parameters that move


def test_warmup_starts_from_rest():
    got = steps(adamw(0.1, warmup_steps=2, total_steps=6), [3.0, 3.0, 3.0])
    np.testing.assert_allclose(got["skip"], [2, 1.95, 1.85], rtol=1e-6)


def test_schedule():
    factor = warmup_cosine(4, 12)
    want = [0, 0.25, 0.5, 0.75, 1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602, 0, 0, 0]
    np.testing.assert_allclose([factor(step) for step in range(15)], want, atol=2e-7)
    np.testing.assert_allclose(jax.jit(factor)(jnp.array(6, jnp.int32)), 0.8535534, atol=2e-7)
    assert warmup_cosine(0, 2)(0) == 1


def test_labels_long_kernels_alone():
    model = fb.linen.SequenceClassifier(3, 4, 2, 16, vocab_size=5, decoder="retrieval", prenorm=True)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 16), jnp.int32)))["params"]
    labels = label_long_kernels(params)
    long = {jax.tree_util.keystr(p, simple=True, separator="/") for p, v in leaves(labels) if v == "long_kernel"}
    assert long == {"blocks/layer/kernel"}
    assert jax.tree.structure(labels) == jax.tree.structure(params)


def test_labels_of_an_nnx_state():
    model = fb.nnx.SequenceClassifier(3, 4, 2, 16, rngs=nnx.Rngs(0))
    labels = label_long_kernels(nnx.state(model, nnx.Param))
    long = [jax.tree_util.keystr(p, simple=True, separator="/") for p, v in leaves(labels) if v == "long_kernel"]
    assert long == ["blocks/layer/kernel/value"]
    assert label_long_kernels({"kernel": 1, "skip": 2}) == {"kernel": "long_kernel", "skip": "other"}
    assert label_long_kernels({"kernel": 1, "bias": 2}) == {"kernel": "other", "bias": "other"}


def test_drives_nnx_optimizer():
    model = fb.nnx.LongConv(2, 8, kernel_init=fb.initializers.random(0.1), rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, adamw(0.1, kernel_learning_rate=0.0, total_steps=4), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((8, 2))).sum())(model))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(after["kernel"], before["kernel"])
    assert (after["skip"] != before["skip"]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -0.1}, r"learning_rate must be >= 0; got -0.1"),
        ({"kernel_learning_rate": -1.0}, r"kernel_learning_rate must be >= 0; got -1.0"),
        ({"weight_decay": -1.0}, r"weight_decay must be >= 0; got -1.0"),
        ({"total_steps": 0}, r"total_steps must be an integer >= 1; got 0"),
        ({"warmup_steps": 4}, r"warmup_steps must be in \[0, total_steps = 4\); got 4"),
        ({"warmup_steps": -1}, r"warmup_steps must be in \[0, total_steps = 4\); got -1"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        adamw(**{"learning_rate": 0.1, "total_steps": 4, **arguments})


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_cosine_ends_at_the_final_fraction():
    """Half way down from 1 to 0.1 is 0.55."""
    schedule = warmup_cosine(2, 6, final_fraction=0.1)
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 2, 4, 6, 9)], [0, 0.5, 1, 0.55, 0.1, 0.1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"^final_fraction must be in \[0, 1\]; got 1\.5\.$"):
        warmup_cosine(2, 6, final_fraction=1.5)
