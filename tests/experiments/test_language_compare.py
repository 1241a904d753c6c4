"""Language models compared: what differs between them, their parameters, their rates, their table, and a kill."""

import functools
import io
import json
import math
import sys
from dataclasses import asdict, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from rich.console import Console

import flashbutterfly_jax as fb
from experiments.common import several
from experiments.common import train as loop
from experiments.common.errors import RunError
from experiments.language import compare, quality
from experiments.language.compare import VARIANTS, Comparison, Options, variant
from experiments.language.quality import MEASURED, bigram
from experiments.language.recipe import PRESETS, Language
from flashbutterfly_jax.functional.butterfly import linear_plan
from tests.experiments.test_report import row
from tests.experiments.tiny_language import TEXT, interrupted_at, tiny_language
from tests.experiments.toy import rows_of


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return replace(tiny_language(tmp_path_factory), num_layers=1, attention_layers=())


def start(recipe, options, folder):
    return Comparison("some models", recipe, options, folder, Console(file=io.StringIO()))


def test_models_differ_in_nothing_but_themselves(recipe):
    recipes = [variant(recipe, model, learning_rate=0.01, seed=3) for model in VARIANTS]
    differing = {field.name for field in fields(Language) if len({getattr(one, field.name) for one in recipes}) > 1}
    assert differing == {"mixer", "rotary", "butterfly", "mlp"}
    tasks = [one.build() for one in [*recipes, replace(recipes[0], seed=4)]]
    first, *others, other_seed = [np.stack([task.train[i]["inputs"] for i in range(20)]) for task in tasks]
    for windows in others:
        np.testing.assert_array_equal(windows, first)
    assert (other_seed != first).any()
    assert [task.flop_per_example is None for task in tasks] == [False, False, False, True, False]


def count(shapes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def parameters(recipe):
    model = recipe.model(257)
    return count(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), int), deterministic=True)))


def test_the_butterfly_has_at_least_30_percent_fewer_parameters_than_the_transformer():
    """Counted by hand, block by block."""
    preset = PRESETS["comparison"]
    d, taps, vocabulary, layers = preset.features, preset.length, 264, preset.num_layers
    norms, attention = 2 * d * (2 * layers + 1), 4 * (d * d + d)
    transformer = vocabulary * d + norms + layers * (attention + 8 * d * d + 5 * d)
    assert parameters(variant(preset, "transformer")) == transformer

    plan = linear_plan(d, 4 * d)
    half = 2 * plan.n + 2 * sum(2 * factor**2 for factor in plan.factors)  # a diagonal and the blocks of two transforms
    mlp = 2 * half + 5 * d
    of_convolution = fb.LearnedButterfly("causal").init(jax.random.key(0), d, taps)
    convolutions = 2 * (d * taps + d + count(of_convolution))
    with_butterflies = vocabulary * d + norms + layers * (attention + mlp) + convolutions  # the other layer attends
    assert parameters(variant(preset, "butterfly")) == with_butterflies
    assert with_butterflies <= 0.7 * transformer


def test_both_apis_have_the_same_model(recipe):
    one = variant(recipe, "butterfly")
    linen = one.model(257)
    names = ("vocab_size", "features", "num_layers", "mixer", "mlp", "num_heads", "init_scale")
    arguments = {name: getattr(linen, name) for name in names}
    bridged = nnx.eval_shape(lambda: fb.nnx.LanguageModel(**arguments, rngs=nnx.Rngs(0)))
    assert count(nnx.state(bridged, nnx.Param)) == parameters(one)


@pytest.mark.parametrize("at_once", [1, 2, 5, 99])
def test_bigrams_by_hand(monkeypatch, at_once):
    """After 0 come 1 1 2 in training, after 1 come 0 0: with one more of each pair, 3/6 of 0 1 and 3/5 of 1 0."""

    class Known(dict):
        vocab_size = 3

    monkeypatch.setattr(quality, "AT_ONCE", at_once)
    tokens = Known(train=np.array([0, 1, 0, 1, 0, 2]), test=np.array([0, 1, 0]))
    found = bigram(tokens, "test")
    assert found.tokens == 2
    assert math.exp(-found.nats) == pytest.approx(3 / 6 * 3 / 5)
    tokens.vocab_size = 4097
    assert bigram(tokens, "test") is None


class Pairs(nn.Module):
    """Logits that depend on the last token alone: compiled in a moment."""

    vocab_size: int

    @nn.compact
    def __call__(self, tokens, *, deterministic):
        return nn.Embed(self.vocab_size, self.vocab_size)(tokens)


def test_what_was_killed_goes_on_and_nothing_is_made_twice(compiled, recipe, tmp_path, monkeypatch):
    options = Options(models=("transformer",), seeds=(1,), learning_rates=(0.01,))
    monkeypatch.setattr(several, "train", functools.partial(loop.train, devices=jax.devices()[:1]))
    monkeypatch.setattr(Language, "model", lambda self, vocab_size: Pairs(vocab_size))
    with interrupted_at(monkeypatch, 5), pytest.raises(KeyboardInterrupt):
        start(recipe, options, tmp_path / "models").run()
    record = start(recipe, options, tmp_path / "models").run()
    folder = tmp_path / "models" / "transformer-seed1-rate0.01"
    assert [one["step"] for one in json.loads((folder / "run.json").read_text())["starts"]] == [0, 4]
    steps = [row["step"] for row in rows_of(folder) if row["split"] == "train"]
    assert steps == [2, 4, 6, 8]
    assert (tmp_path / "models" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for function in ("train", "measured"):  # nothing is made again
        monkeypatch.setattr(several if function == "train" else compare, function, None)
    assert start(recipe, options, tmp_path / "models").run() | {"date": record["date"]} == record

    # Exact bits per byte by hand, of a text whose separator is paid for.
    found = json.loads((folder / "quality.json").read_text())["test"]
    assert found["tokens"] == len(TEXT) * 12  # all but the first, with the separator
    assert record["rows"][0]["test"] == pytest.approx(found["nats"] / math.log(2) / (len(TEXT) * 12))


def fake_training(losses, diverged=(), killed=None):
    """A `train_all` after which each run is as if it had ended with the loss of its name; one is interrupted."""

    def train_all(recipes, folder, console, after=None):
        failed = {}
        for name, one in recipes.items():
            if name == killed:
                raise KeyboardInterrupt
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            loss, steps = losses.get(name, 2.0), one.steps
            rows = [row(steps, "train", loss, 0.0), row(steps, "validation", loss, 0.0), row(steps, "test", loss, 0.0)]
            if name in diverged:
                rows, failed[name] = (
                    rows[:1],
                    f"the training loss is nan at step 4, where a finite number was expected; see {place}",
                )
            (place / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
            begin = {"device": "abacus cpu", "cpu_cores": 1, "parameters": 10, "versions": {"jax": "0"}}
            described = {"recipe": {"name": "Language", **asdict(one)}, "starts": [begin]}
            (place / "run.json").write_text(json.dumps(described, default=str))
            if after is not None and name not in diverged:
                nats = {split: {"nats": loss * 540, "tokens": 540} for split in compare.SPLITS}
                (place / "quality.json").write_text(json.dumps(nats))
                after(name)
        return failed

    return train_all


def test_each_model_has_the_best_of_the_same_rates(recipe, tmp_path, monkeypatch):
    losses = {"transformer-rate0.01": 1.5, "transformer-rate0.1": 1.0, "h3-rate0.1": 2.1}
    monkeypatch.setattr(compare, "train_all", fake_training(losses, diverged=("transformer-rate0.1",)))
    options = Options(models=("transformer", "h3"), seeds=(5,), learning_rates=(0.001, 0.01, 0.1), tuning_steps=4)
    record = start(recipe, options, tmp_path).run()
    assert [line["learning_rate"] for line in record["rows"]] == [0.01, 0.001]
    assert record["tuning"]["validation_loss"]["transformer"] == {"0.001": 2.0, "0.01": 1.5, "0.1": None}
    short = json.loads((tmp_path / "h3-rate0.1" / "run.json").read_text())["recipe"]
    assert (short["steps"], short["warmup_steps"], short["evaluate_every"], short["seed"]) == (4, 0, 4, 5)
    assert "of 0.001, 0.01, 0.1 that with the lowest loss after 4 steps" in (tmp_path / "comparison.md").read_text()
    everywhere = [f"h3-rate{rate}" for rate in (0.001, 0.01, 0.1)]
    monkeypatch.setattr(compare, "train_all", fake_training({}, diverged=everywhere))
    with pytest.raises(RunError, match=r"one at which h3 can be trained; got .*: the training loss is nan at step 4"):
        start(recipe, replace(options, models=("h3",)), tmp_path / "other").run()


def test_runs_of_another_recipe_are_refused_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "train_all", fake_training({}))
    options = Options(models=("transformer",), seeds=(0,), learning_rates=(0.01,))
    start(recipe, options, tmp_path).run()
    before = (tmp_path / "comparison.md").read_bytes()
    with pytest.raises(RunError, match="another recipe"):
        start(replace(recipe, steps=recipe.steps // 2), options, tmp_path).run()
    assert (tmp_path / "comparison.md").read_bytes() == before


def test_what_is_known_is_there_after_each_run(recipe, tmp_path, monkeypatch):
    options = Options(models=("transformer", "h3"), learning_rates=(0.01,))
    monkeypatch.setattr(compare, "train_all", fake_training({}, killed="transformer-seed1-rate0.01"))
    with pytest.raises(KeyboardInterrupt):
        start(recipe, options, tmp_path).run()
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert [[seed["seed"] for seed in row["seeds"]] for row in rows] == [[0], [0]]
    assert "| h3, 1 of 2 seeds missing | 10 |" in (tmp_path / "comparison.md").read_text()


def test_a_seed_that_diverges_is_named_and_in_no_mean(recipe, tmp_path, monkeypatch):
    bits = math.log(2)  # a loss of one bit
    losses = {"h3-seed0-rate0.01": bits, "h3-seed1-rate0.01": 2 * bits, "butterfly-seed0-rate0.01": 3 * bits}
    monkeypatch.setattr(compare, "train_all", fake_training(losses, diverged=("butterfly-seed1-rate0.01",)))
    options = Options(models=("h3", "butterfly"), learning_rates=(0.01,))
    record = start(recipe, options, tmp_path).run()
    h3, butterfly = record["rows"]
    assert (h3["validation"], h3["validation_deviation"]) == pytest.approx((1.5, 0.5**0.5))
    assert (butterfly["validation"], butterfly["validation_deviation"]) == (pytest.approx(3), None)
    page = (tmp_path / "comparison.md").read_text()
    assert "| model | parameters | to h3 |" in page
    assert "| h3 | 10 | +0% | 0.01 | 1.500 ± 0.707 | 1.000 · 2.000 | 1.500 ± 0.707 |" in page
    assert (
        "| butterfly, 1 of 2 seeds missing, seed 1: the training loss is nan at step 4 | 10 | +0% | 0.01 | 3.000 |"
        in page
    )
    assert "ms per step, CPU" in page
    for place in (recipe.data_dir, tmp_path):  # that is nobody's business
        assert str(place) not in (tmp_path / "comparison.json").read_text() + page
    assert "| gzip -9 |" in page
    assert f"at most {MEASURED:,} tokens" in page
    assert h3["seeds"][0]["curves"]["validation"] == [(8, pytest.approx(541 / 540, abs=1e-4))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--learning-rate", "0.1"), "learning_rate must not be given, as it differs from model to model or run to"),
        (("--mlp", "butterfly"), "mlp must not be given"),
        (("--steps", "0"), "steps must be at least 1; got 0"),
        (("--path", "nowhere"), "path must be a file or a folder of text; got nowhere"),
    ],
)
def test_comparisons_that_cannot_be(tmp_path, monkeypatch, arguments, message, capsys):
    command = ["compare", "--task", "text", "--preset", "smoke", *arguments, "--workdir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as refused:
        compare.main()
    assert message in " ".join(f"{refused.value} {capsys.readouterr()}".replace("│", "").split())


def test_wrong_options():
    for name, value in (("seeds", ()), ("models", ("h3", "h3")), ("learning_rates", (0.1, 0.1))):
        with pytest.raises(ValueError, match=f"^{name} must be at least one, each once; got"):
            Options(**{name: value})
    with pytest.raises(ValueError, match=r"^learning_rates must differ in their first six digits; got"):
        Options(learning_rates=(0.00100001, 0.001000011))  # which would be one folder
    with pytest.raises(ValueError, match=r"^tuning_steps must be at least 1; got 0\.$"):
        Options(tuning_steps=0)
    with pytest.raises(
        ValueError,
        match=r"^butterfly must be None for the mixer h3, which has no long convolutions to learn; got causal\.$",
    ):
        Language(mixer="h3", butterfly="causal")


@pytest.mark.slow
def test_all_models_train(compiled, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(several, "train", functools.partial(loop.train, devices=jax.devices()[:1]))
    record = start(recipe, Options(seeds=(0,), learning_rates=(0.01,)), tmp_path).run()
    assert [line["model"] for line in record["rows"]] == ["transformer", "h3", "h3_long_conv", "butterfly"]
    assert all(0 < line["test"] < 9 and line["ms_per_step"] > 0 for line in record["rows"])
