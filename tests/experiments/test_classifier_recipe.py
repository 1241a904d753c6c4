"""The options that all classifiers share reach the model and its optimiser."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.lra.listops.recipe import SMOKE

LAYERS = {"long_conv": "LongConv", "transformer": "Transformer", "s4d": "S4D", "s5": "S5"}


@pytest.mark.parametrize("architecture", LAYERS)
def test_the_architecture_is_that_of_the_layers(architecture):
    recipe = dataclasses.replace(SMOKE, architecture=architecture, bidirectional=True)
    model = recipe.model()
    assert model.layer.func.__name__ == LAYERS[architecture]
    assert model.layer.keywords["bidirectional"]
    params = jax.eval_shape(
        lambda key: model.init(key, np.zeros((1, 64), np.uint8), deterministic=True), jax.random.key(0)
    )["params"]
    slow = jax.tree.leaves(recipe.optimizer().init(params).inner_states["long_kernel"])
    moments = sum(leaf.size for leaf in slow if leaf.ndim)
    assert (moments > 0) == (architecture != "transformer")


def test_kernels_are_smoothed_and_attention_is_what_was_asked_for():
    assert dataclasses.replace(SMOKE, smooth_width=5).model().layer.keywords["smooth_width"] == 5
    transformer = dataclasses.replace(SMOKE, architecture="transformer", attention="cudnn").model()
    assert transformer.layer.keywords["implementation"] == "cudnn"
