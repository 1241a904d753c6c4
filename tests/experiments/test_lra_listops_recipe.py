"""The ListOps recipes: the paper's numbers, and what they build."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import flashbutterfly_jax as fb
from experiments.lra.listops import released
from experiments.lra.listops.recipe import PAPER, SMALL, SMOKE, ListOps


def test_presets_have_their_names():
    from experiments.lra.train import RECIPES

    assert RECIPES["listops"] == {"paper": PAPER, "small": SMALL, "smoke": SMOKE}
    assert ListOps() == PAPER


def test_the_paper_preset_is_the_authors_recipe():
    # HazyResearch/safari, configs/experiment/lra/long-conv-lra-listops.yaml and the configs that it builds on.
    assert (PAPER.num_layers, PAPER.features, PAPER.channels, PAPER.max_length) == (8, 128, 2, 2048)
    assert (PAPER.norm, PAPER.prenorm, PAPER.bidirectional, PAPER.dropout_rate) == ("batch", False, False, 0)
    assert (PAPER.kernel_init, PAPER.squash_threshold, PAPER.kernel_dropout_rate) == ("random", 0.002, 0.2)
    assert PAPER.smooth_width == 1
    assert (PAPER.learning_rate, PAPER.kernel_learning_rate, PAPER.weight_decay) == (0.01, 0.0005, 0.05)
    assert (PAPER.warmup_steps, PAPER.decay_steps) == (10_000, 80_000)
    assert (PAPER.train_rows, PAPER.validation_rows, PAPER.test_rows) == (96_000, 2_000, 2_000)
    assert PAPER.batch_size == 50
    assert PAPER.steps * PAPER.batch_size == 40 * PAPER.train_rows
    assert PAPER.evaluate_every * PAPER.batch_size == PAPER.train_rows
    assert PAPER.optimizer() is not None


def test_the_paper_preset_has_the_authors_number_of_parameters():
    model = PAPER.model()
    shapes = jax.eval_shape(
        lambda key: model.init(key, np.zeros((1, 2048), np.uint8), deterministic=True), jax.random.key(0)
    )
    params = shapes["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]["layer"])) == 4_722_688  # 4.72 million
    assert params["encoder"]["embedding"].shape == (18, 128)
    assert params["blocks"]["layer"]["kernel"].shape == (8, 2, 128, 2048)
    assert params["head"]["kernel"].shape == (128, 10)


def test_a_task_has_rows_of_one_shape():
    task = SMOKE.build()
    assert len(task.train) == SMOKE.train_rows
    assert {name: len(rows) for name, rows in task.evaluation.items()} == {"validation": 10, "test": 10}
    for source in (task.train, *task.evaluation.values()):
        shapes = {(row["inputs"].shape, row["inputs"].dtype, row["labels"].shape) for row in source}
        assert shapes == {((64,), np.dtype(np.uint8), ())}


def test_batches_are_a_function_of_the_seed_and_of_their_number():
    def epoch(recipe: ListOps, number: int) -> list[bytes]:
        train = recipe.build().train
        return [train[i]["inputs"].tobytes() for i in range(number * len(train), (number + 1) * len(train))]

    assert epoch(SMOKE, 0) == epoch(SMOKE, 0)
    assert epoch(SMOKE, 1) != epoch(SMOKE, 0)
    assert sorted(epoch(SMOKE, 1)) == sorted(epoch(SMOKE, 0))
    other = dataclasses.replace(SMOKE, seed=1)
    assert epoch(other, 0) != epoch(SMOKE, 0)
    assert sorted(epoch(other, 0)) == sorted(epoch(SMOKE, 0))  # the rows have a seed of their own


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_the_same_from_memory_and_from_a_folder(tmp_path, workers, capsys):
    stored = dataclasses.replace(SMOKE, data_dir=tmp_path, workers=workers).load()
    assert [path.name for path in tmp_path.iterdir()] == ["listops"]
    assert capsys.readouterr().err.startswith("drawing 32 expressions into ")
    for one, other in zip(stored, SMOKE.load(), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_released_files_replace_what_is_drawn(tmp_path):
    for name in released.FILES:
        (tmp_path / name).write_text("Source\tTarget\n( ( ( [SM 7 ) 8 ) ] )\t5\n")
    splits = dataclasses.replace(SMOKE, tsv_dir=tmp_path).load()
    assert splits.test.labels.tolist() == [5]
    with pytest.raises(ValueError, match=r"tsv_dir must be a folder .* lacks basic_train\.tsv"):
        dataclasses.replace(SMOKE, tsv_dir=tmp_path / "nowhere").build()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_does_not_change_what_is_pooled(dtype):
    """A causal model that pools over the lengths gives the same logits however far a row is padded."""
    recipe = dataclasses.replace(SMOKE, dtype=dtype, max_length=64)
    model = recipe.model()
    rows = recipe.load().test
    longest = rows.lengths.max()
    assert longest < 64

    @jax.jit
    def outputs():
        arguments = {"lengths": rows.lengths, "deterministic": True}
        variables = model.init(jax.random.key(0), rows.tokens, **arguments)
        return [model.apply(variables, rows.tokens[:, :length], **arguments) for length in (64, longest)]

    padded, cut = outputs()
    assert padded.dtype == dtype
    # Measured: 2e-7 and 8e-3, of logits about 0.5.
    np.testing.assert_allclose(padded.astype(np.float32), cut, atol={"float32": 2e-6, "bfloat16": 3e-2}[dtype])


def test_the_implementation_reaches_the_convolution():
    row = np.zeros((1, 64), np.uint8)

    def refused(**options):
        model = dataclasses.replace(SMOKE, **options).model()
        with pytest.raises((NotImplementedError, ValueError), match="mosaic_gpu"):
            model.init(jax.random.key(0), row, deterministic=True)

    refused(implementation="mosaic_gpu")  # float32
    layer = dataclasses.replace(SMOKE, implementation="xla").model().layer
    assert layer.keywords["implementation"] == "xla"
    assert layer.func is fb.linen.LongConv


def test_nothing_heavy_is_imported_for_help():
    import subprocess
    import sys

    program = "import sys, experiments.lra.listops.recipe; assert 'tensorflow_datasets' not in sys.modules"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=root, check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ({"features": 0}, "features must be at least 1; got 0"),
        ({"channels": -1}, "channels must be at least 1; got -1"),
        ({"workers": 0}, "workers must be at least 1; got 0"),
        ({"max_length": 1}, "max_length must be at least 2; got 1"),
        ({"squash_threshold": -0.1}, "squash_threshold must be at least 0; got -0.1"),
        ({"smooth_width": 4}, "smooth_width must be odd and at least 1; got 4"),
        ({"kernel_dropout_rate": 1.0}, "kernel_dropout_rate must be from 0 to below 1; got 1.0"),
        ({"dropout_rate": -0.5}, "dropout_rate must be from 0 to below 1; got -0.5"),
        ({"min_tokens": 2000}, "min_tokens must be from 1 to max_tokens = 1999; got 2000"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        ({"train_rows": 0}, "train_rows must be at least 1; got 0"),
        ({"data_seed": -1}, "data_seed must be at least 0; got -1"),
    ],
)
def test_options_say_what_they_expect(options, message):
    with pytest.raises(ValueError, match=rf"^{message}\.$"):
        ListOps(**options)
