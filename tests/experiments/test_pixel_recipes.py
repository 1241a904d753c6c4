"""The recipes of Image, sequential and two-dimensional CIFAR-10, Pathfinder, Path-X and Path256."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.images import substitutes
from experiments.images.recipe import GRAY, GRID, RGB, small, smoke
from experiments.images.train import RECIPES as IMAGES
from experiments.lra.pathfinder import recipe as pathfinder
from experiments.lra.train import RECIPES as LRA


def layers_of(recipe, features=1):
    model = recipe.model()
    inputs = np.zeros((1, *((32, 32) if getattr(recipe, "form", "") == "grid" else (16,)), features), np.float32)
    shapes = jax.eval_shape(lambda key: model.init(key, inputs, deterministic=True), jax.random.key(0))
    return shapes["params"]["blocks"]["layer"]


def parameters(layers) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(layers))


def test_every_task_has_three_presets():
    tables = {**{name: LRA[name] for name in ("image", "pathfinder", "pathx", "path256")}, **IMAGES}
    assert tables.keys() == {"image", "pathfinder", "pathx", "path256", "scifar", "cifar2d"}
    assert all(list(presets) == ["paper", "small", "smoke"] for presets in tables.values())


def test_the_paper_presets_are_the_authors_recipes():
    # HazyResearch/safari, configs/experiment/lra/long-conv-lra-{image,pathfinder,pathx}.yaml and long-conv-cifar.yaml.
    for one, threshold, epochs, decay in ((GRAY, 0.003, 200, 200_000), (RGB, 0.001, 300, 300_000)):
        assert (one.num_layers, one.features, one.channels, one.norm, one.prenorm) == (6, 512, 2, "layer", False)
        assert (one.dropout_rate, one.kernel_dropout_rate, one.squash_threshold) == (0.1, 0.2, threshold)
        assert (one.learning_rate, one.kernel_learning_rate, one.weight_decay) == (0.01, 0.001, 0.05)
        assert (one.batch_size, one.steps, one.warmup_steps, one.decay_steps) == (50, 900 * epochs, 1000, decay)
        assert not one.bidirectional
    for one, rates, rest in (
        (pathfinder.PAPER, (0.004, 0.001, 0.03), (64, 200, 2500, "last")),
        (pathfinder.PATH_X, (0.0005, 0.0005, 0.05), (16, 50, 10_000, "mean")),
    ):
        assert (one.num_layers, one.features, one.channels, one.norm, one.prenorm) == (6, 256, 2, "batch", True)
        assert (one.dropout_rate, one.kernel_dropout_rate, one.squash_threshold) == (0, 0.3, 0.001)
        assert (one.learning_rate, one.kernel_learning_rate, one.weight_decay) == rates
        batch, epochs, warmup, decoder = rest
        assert (one.batch_size, one.warmup_steps, one.decoder) == (batch, warmup, decoder)
        assert one.steps == one.decay_steps == 160_000 // batch * epochs
        assert one.bidirectional
        assert one.difficulty == "curv_contour_length_14"
    assert all(one.kernel_init == "random" and one.smooth_width == 1 for one in (GRAY, RGB, pathfinder.PATH_X))


def test_the_paper_presets_have_the_authors_numbers_of_parameters():
    assert round(parameters(layers_of(GRAY)) / 1e6, 2) == 12.60
    assert parameters(layers_of(RGB, 3)) == parameters(layers_of(GRAY))
    assert round(parameters(layers_of(pathfinder.PAPER)) / 1e6, 2) == 7.87
    assert round(parameters(layers_of(pathfinder.PATH_X)) / 1e6, 1) == 102.2
    assert layers_of(pathfinder.PATH_256)["kernel"].shape == (6, 4, 256, 65_536)


def test_the_grid_has_kernels_as_large_as_the_image_that_look_to_all_sides():
    kernel = layers_of(GRID, 3)["kernel"]
    assert kernel.shape == (6, 4 * 2, 512, 32, 32)
    assert dataclasses.replace(GRID, bidirectional=False).model().layer.keywords["causal"] == (True, True)


@pytest.mark.parametrize("form", ["gray", "rgb", "grid"])
def test_digits_are_the_same_images_in_every_form(form):
    shape = {"gray": (1024, 1), "rgb": (1024, 3), "grid": (32, 32, 3)}[form]
    splits = substitutes.digits(form)
    assert [len(split) for split in splits] == [1197, 200, 400]
    example = splits.train[0]
    assert example["inputs"].shape == shape
    assert example["inputs"].dtype == np.uint8
    assert example["inputs"].max() > 200
    seen = {split[row]["inputs"].tobytes() for split in splits[1:] for row in range(len(split))}
    assert not any(splits.train[row]["inputs"].tobytes() in seen for row in range(len(splits.train)))
    assert {int(splits.test[row]["labels"]) for row in range(400)} == set(range(10))


@pytest.mark.parametrize("recipe", [smoke(GRAY), smoke(RGB), smoke(GRID), pathfinder.smoke(pathfinder.PATH_X)])
def test_batches_are_bytes_and_models_see_numbers(recipe):
    task = recipe.build()
    seen = []

    class Model:
        def __call__(self, inputs, *, deterministic):
            seen.append(inputs)

    example = task.train[0]
    assert example["inputs"].dtype == np.uint8
    task.forward(Model(), {"inputs": example["inputs"][None]}, True)
    assert seen[0].dtype == np.float32
    assert abs(seen[0]).max() < 3


def test_released_pathfinder_images_are_read_instead(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(pathfinder.released, "splits", lambda *args, **options: asked.append((args, options)))
    recipe = dataclasses.replace(pathfinder.PATH_X, release=tmp_path / "lra_release.gz", data_dir=tmp_path)
    recipe.load()
    assert asked[0][0] == (tmp_path / "lra_release.gz", 128, "curv_contour_length_14")
    assert asked[0][1]["data_dir"] == tmp_path


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (GRID, {"architecture": "s5"}, "architecture must be long_conv where form is grid; got s5."),
        (GRID, {"kernel_init": "geometric_decay"}, "kernel_init must be random where form is grid; got geometric_de"),
        (pathfinder.PAPER, {"workers": 0}, "workers must be at least 1; got 0."),
        (pathfinder.PAPER, {"train_rows": 0}, "train_rows must be at least 1; got 0."),
        (pathfinder.PAPER, {"distractors": -1}, "distractors must be at least 0; got -1."),
        (pathfinder.PAPER, {"release": "x", "data_dir": None}, "data_dir must be a folder, to which the released"),
    ],
)
def test_options_say_what_they_expect(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe, **options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("recipe", "steps", "least"), [(small(GRAY), 150, 0.2), (pathfinder.SMALL, 400, 0.6)])
def test_small_presets_beat_chance(tmp_path, recipe, steps, least):
    """In fewer steps than theirs: chance is 0.1, and 0.5."""
    from experiments.common.train import train

    shorter = dataclasses.replace(recipe, steps=steps, checkpoint_every=steps)
    result = train(shorter, tmp_path / "run", devices=jax.devices()[:1])
    test = [row for row in result.rows if row["split"] == "test"][-1]
    assert test["accuracy"] > least
