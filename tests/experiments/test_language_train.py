"""Language models in the training loop: perplexity by hand, a batch by heart, killed and resumed, and written from."""

import gc
import io
import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from rich.console import Console

import flashbutterfly_jax as fb
from experiments.common import train as loop
from experiments.common.errors import RunError
from experiments.language import generate, step_times
from experiments.language.flop import training_flop
from experiments.language.perplexity import perplexity
from experiments.language.recipe import PRESETS, Language
from experiments.language.tokenizers import ByteTokenizer
from experiments.language.trained import load
from tests.experiments.tiny_language import TEXT, interrupted_at, tiny_language
from tests.experiments.toy import rows_of


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_language(tmp_path_factory)


def run(recipe, folder, devices=1):
    console = Console(file=io.StringIO())
    return loop.train(recipe, folder, devices=jax.devices()[:devices], console=console)


@pytest.fixture(scope="module")
def finished(compiled, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, run(recipe, folder)


class Known(nn.Module):
    """After token a comes a again with probability 0.5, and each of the three others with 1/6; after 3 nobody knows."""

    @nn.compact
    def __call__(self, tokens, *, deterministic):
        same = jnp.where(jax.nn.one_hot(tokens, 4) > 0, 0.5, 1 / 6)
        return jnp.log(jnp.where((tokens == 3)[..., None], 0.25, same))


@pytest.mark.parametrize("stride", [None, 1, 3])
def test_perplexity_by_hand(stride):
    """Of 0 0 1 3 2 2: 1/2, 1/6, 1/6, 1/4, 1/2, so that it is 576 to the power of 1/5."""
    measured = perplexity(Known(), {}, np.array([0, 0, 1, 3, 2, 2]), length=4, stride=stride, batch_size=2)
    assert measured.tokens == 5
    assert measured.value == pytest.approx(576 ** (1 / 5), rel=1e-6)
    assert measured.bits_per_byte(6) == pytest.approx(math.log2(576) / 6, rel=1e-6)


def test_sliding_windows_see_more():
    """A model that counts what it sees: the more there is, the likelier the next token."""

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, tokens, *, deterministic):
            seen = jnp.broadcast_to(jnp.arange(1, tokens.shape[1] + 1), tokens.shape)
            return jnp.log(jnp.stack([seen / (seen + 1), 1 / (seen + 1)], -1))

    zeros = np.zeros(9, int)
    whole = perplexity(Counting(), {}, zeros, length=4)
    assert math.exp(-whole.nats) == pytest.approx((1 / 5) ** 2)  # 1/2 2/3 3/4 4/5, twice
    sliding = perplexity(Counting(), {}, zeros, length=4, stride=1)
    assert math.exp(-sliding.nats) == pytest.approx(1 / 5 * (4 / 5) ** 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": np.zeros(1, int)}, "^tokens must be at least 2, one to predict from the other; got 1"),
        ({"length": 0}, "^length must be from 1; got 0"),
        ({"stride": 5}, "^stride must be from 1 to 4; got 5"),
    ],
)
def test_wrong_measurements(arguments, message):
    arguments = {"tokens": np.zeros(9, int), "length": 4} | arguments
    with pytest.raises(ValueError, match=message):
        perplexity(Known(), {}, arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize(
    "mixer",
    ["h3_long_conv", pytest.param("h3", marks=pytest.mark.slow), pytest.param("attention", marks=pytest.mark.slow)],
)
def test_one_batch_is_learned_by_heart(mixer):
    """Random tokens: 3.18 nats each at first, below 0.2 in the end."""
    recipe = Language(
        mixer=mixer,
        features=32,
        num_layers=2,
        num_heads=2,
        length=16,
        steps=150,
        learning_rate=0.01,
        warmup_steps=10,
        weight_decay=0.0,
        rotary=True,
    )
    model = recipe.model(24)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, (4, 17)))
    optimizer = recipe.optimizer()

    def loss_of(params):
        logits = model.apply({"params": params}, tokens[:, :-1], deterministic=True)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def learn():
        params = model.init(jax.random.key(0), tokens[:, :-1], deterministic=True)["params"]
        return jax.lax.scan(step, (params, optimizer.init(params)), length=recipe.steps)[1]

    losses = learn()
    assert losses[0] == pytest.approx(math.log(24), abs=0.1)
    assert losses[-1] < 0.2


def test_rows_have_tokens_per_second(finished, recipe):
    row = json.loads((finished[0] / "metrics.jsonl").read_text().splitlines()[0])
    timing = row["timing"]
    assert timing["tokens_per_second"] == pytest.approx(16 * timing["examples_per_second"], rel=1e-3)
    flop = training_flop(recipe, 257)
    assert timing["model_flop_per_second"] == pytest.approx(flop * timing["examples_per_second"], rel=1e-3)
    assert "model_flop_utilization" not in timing  # nobody knows what this CPU could do


def test_flop_are_about_six_for_each_weight_and_token():
    small = PRESETS["125M-transformer"]
    weights = 12 * 12 * 768**2 + 768 * 50257
    products = 6 * weights * 2048
    attention = training_flop(small, 50257) - products
    assert attention == 3 * 12 * 2 * 2048**2 * 768
    filters = training_flop(PRESETS["125M"], 50257) - products - attention / 6
    assert filters == 3 * 10 * 2 * 768 * (2 * 2.5 * 4096 * 12 + 6 * 2049)


def test_killed_between_checkpoints_it_goes_on_to_the_bit(finished, recipe, tmp_path, monkeypatch):
    with interrupted_at(monkeypatch, 5), pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run")
    result = run(recipe, tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(finished[0])
    jax.tree.map(np.testing.assert_array_equal, result.state.params, finished[1].state.params)


def differences(rows, expected):
    names = ("loss", "gradient_norm")
    return max(
        abs(row[name] - other[name])
        for row, other in zip(rows, expected, strict=True)
        for name in names
        if name in other
    )


def test_a_sharded_state_learns_the_same(finished, recipe, tmp_path):
    """But for the order of additions."""
    wide = replace(recipe, features=64, num_layers=1, attention_layers=())  # wide enough to be divided
    whole = run(wide, tmp_path / "whole")
    parts = run(replace(wide, state_sharding="sharded"), tmp_path / "parts", devices=8)
    assert differences(rows_of(tmp_path / "parts"), rows_of(tmp_path / "whole")) < 1e-4
    kernel = parts.state.params["layers_0"]["mlp"]["hidden"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 256)
    moments = [leaf for leaf in jax.tree.leaves(parts.state.optimizer) if leaf.shape == kernel.shape]
    assert moments
    assert all(leaf.sharding.shard_shape(leaf.shape) == (8, 256) for leaf in moments)
    assert whole.state.params["embedding"].sharding.is_fully_replicated


def test_parts_of_a_batch_give_the_same_gradient(finished, recipe, tmp_path):
    """But for the order of additions."""
    run(replace(recipe, accumulation=4), tmp_path / "run")
    assert differences(rows_of(tmp_path / "run"), rows_of(finished[0])) < 1e-4


def test_gradients_are_clipped(recipe):
    params = {"a": jnp.zeros(4)}
    optimizer = replace(recipe, clip_norm=0.5, warmup_steps=0).optimizer()
    _, state = optimizer.update({"a": jnp.full(4, 3.0)}, optimizer.init(params), params)
    first = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,))
    np.testing.assert_allclose(first, 0.1 * 0.25, rtol=1e-5)  # (1 - b1) times 0.5 / sqrt(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_norm": 0.0}, r"^clip_norm must be above 0 and finite; got 0\.0\.$"),
        ({"accumulation": 3}, r"^accumulation must be a divisor of batch_size = 8; got 3\.$"),
        ({"num_heads": 3}, r"^num_heads must be a divisor of features = 128; got 3\.$"),
        ({"attention_layers": (4,)}, r"^attention_layers must be from 0 to 3; got \(4,\)\.$"),
        ({"length": 0}, r"^length must be at least 1; got 0\.$"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(ValueError, match=message):
        Language(**change)


def test_parts_must_be_shared_by_the_devices(recipe, tmp_path):
    message = r"^batch_size must be a multiple of the 8 devices times accumulation = 2, such as 16; got 8\.$"
    with pytest.raises(RunError, match=message):
        run(replace(recipe, accumulation=2), tmp_path / "run", devices=8)


def test_a_trained_model_writes_on(finished):
    trained = load(finished[0])
    assert trained.step == 8
    jax.tree.map(np.testing.assert_array_equal, trained.variables["params"], finished[1].state.params)
    options = generate.Options(finished[0], prompt="the", tokens=9, samples=2)
    pieces = list(generate.texts(trained, options))
    assert pieces[0] == "the"
    assert len(pieces) >= 9
    assert pieces[-1].startswith("\n\n--- 2 ---\nthe")
    assert pieces == list(generate.texts(trained, options))


def test_a_measured_file(finished, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    trained = load(finished[0])
    sentence = generate.measure(trained, generate.Options(finished[0], perplexity_of=tmp_path / "text.txt"))
    assert sentence.split(" perplexity of ")[1].startswith(f"{len(TEXT)} tokens")
    (tmp_path / "text.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"^perplexity_of must be UTF-8 text; .* is not, at byte 0\.$"):
        generate.measure(trained, generate.Options(finished[0], perplexity_of=tmp_path / "text.txt"))


def test_text_comes_in_whole_characters():
    tokens = [*"aé€".encode(), 256, *b"b", 0xE2]
    assert list(generate.decoded(tokens, ByteTokenizer())) == ["a", "", "é", "", "", "€", "\n", "b", "", "\ufffd"]


def test_workdirs_of_something_else(finished, tmp_path):
    with pytest.raises(RunError, match=r"^workdir must be the folder of a training run; .* has no run\.json\.$"):
        load(tmp_path)
    described = json.loads((finished[0] / "run.json").read_text())
    cases = [
        ({"name": "Toy"}, r"^workdir must be the folder of a language model; .* has a run of something else\.$"),
        ({"new_option": 1}, r"is of another version of this program: it has not the same options \(new_option\)\.$"),
        ({"features": 0}, r"describes no run that can be \(features must be at least 1; got 0\.\)$"),
        ({}, r"^workdir must have checkpoints; .* has none yet\.$"),
    ]
    for change, message in cases:
        (tmp_path / "run.json").write_text(json.dumps({"recipe": described["recipe"] | change}))
        with pytest.raises(RunError, match=message):
            load(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a read that nobody waits for
def test_a_checkpoint_of_another_configuration(finished, tmp_path):
    described = json.loads((finished[0] / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({"recipe": described["recipe"] | {"features": 16}}))
    (tmp_path / "checkpoints").symlink_to(finished[0] / "checkpoints")
    with pytest.raises(RunError, match=r"is damaged or of another model"):
        load(tmp_path)
    gc.collect()


def test_step_times_of_a_tiny_model(tmp_path, monkeypatch, capsys):
    tiny = fb.models.language.Size(8, 1, 2, (), 6e-4, 4)
    monkeypatch.setitem(fb.models.SIZES, "125M", tiny)
    monkeypatch.setattr(step_times, "VOCAB", 32)
    output = tmp_path / "out" / "times.json"
    arguments = ["--models", "h3_long_conv", "transformer", "--lengths", "16", "--tokens", "32", "--steps", "2"]
    step_times.main([*arguments, "--dtype", "float32", "--output", str(output)])
    record = json.loads(output.read_text())
    rows = {row["model"]: row for row in record["rows"]}
    assert [row["status"] for row in rows.values()] == ["measured", "measured"]
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        assert row["attention"] == "xla"
    assert "to Transformer" in capsys.readouterr().out


def test_step_times_say_what_failed():
    case = step_times.Case("transformer", fb.models.language.Size(9, 1, 2, (), 6e-4, 4), 16, 32, 2, "none")
    row = step_times.measure(case)
    assert row["status"] == "failed"
    assert "num_heads must divide features = 9" in row["reason"]
    assert "num_heads" in step_times.table([row])
