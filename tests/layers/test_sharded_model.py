"""A training step of a whole model on a mesh of (data, feature): no more travels than must."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashbutterfly_jax as fb

BATCH, LENGTH, FEATURES, CHANNELS, LAYERS, CLASSES = 16, 44, 8, 2, 2, 3
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
TOLERANCE = 2e-6  # relative to the largest, float32; measured 4e-7


def model():
    layer = functools.partial(fb.linen.LongConv, squash_threshold=0.001, channels=CHANNELS)
    return fb.linen.SequenceClassifier(
        num_classes=CLASSES, features=FEATURES, num_layers=LAYERS, kernel_length=LENGTH, input_features=1, layer=layer
    )


def loss_and_gradient(params, x, labels):
    def loss_of(params):
        logits = model().apply({"params": params}, x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.value_and_grad(loss_of)(params)


def collectives(text: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Each collective of a compiled program, with the dtype and the shape of each array of its result."""
    found = []
    for results, operation in re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", text):
        for dtype, shape in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", results):
            found.append((operation, dtype, tuple(int(n) for n in shape.split(",") if n)))
    return found


def check_values(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(np.asarray(a) - b).max() < TOLERANCE * np.abs(b).max()


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2)], ids=str)
def test_a_training_step(sizes):
    """No code but shardings: the batch over data, convolution kernels over feature, the rest on every device.

    The convolutions add nothing to what data parallelism and layers that mix features need: all-reduces of gradients,
    the kernels' as spectra, and exchanges of real activations within the part of the batch that a device has.
    """
    data, feature = sizes
    mesh = jax.make_mesh(sizes, ("data", "feature"), axis_types=(AxisType.Auto,) * 2)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((BATCH, LENGTH, 1)), jnp.float32)
    labels = jnp.asarray(random.integers(0, CLASSES, BATCH))
    params = jax.jit(model().init)(jax.random.key(0), x)["params"]

    def sharding(path, array):
        name = jax.tree_util.keystr(path)
        if name == "['blocks']['layer']['kernel']":
            return NamedSharding(mesh, P(None, None, "feature"))
        return NamedSharding(mesh, P())

    shardings = jax.tree_util.tree_map_with_path(sharding, params)
    assert {s.spec for s in jax.tree.leaves(shardings)} == {P(), P(None, None, "feature")}
    placed = jax.device_put(params, shardings)
    by_batch = NamedSharding(mesh, P("data"))
    arguments = placed, jax.device_put(x, by_batch), jax.device_put(labels, by_batch)
    out_shardings = NamedSharding(mesh, P()), shardings
    compiled = jax.jit(loss_and_gradient, out_shardings=out_shardings).lower(*arguments).compile()

    check_values(compiled(*arguments), jax.jit(loss_and_gradient)(params, x, labels))

    moved = collectives(compiled.as_text())
    assert moved, "gradients are summed over the batch"
    spectrum = CHANNELS * FEATURES // feature * (LENGTH + 2)  # of 2 L + 2 points
    activations = BATCH // data * LENGTH * CHANNELS * FEATURES
    for operation, dtype, shape in moved:
        if dtype.startswith("c"):
            assert operation == "all-reduce", moved
            assert math.prod(shape) <= spectrum, moved
        elif feature == 1:
            assert operation == "all-reduce", moved
            assert LENGTH not in shape, moved
        else:
            assert math.prod(shape) <= activations, moved
