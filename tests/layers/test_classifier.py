"""The residual block and the classifier: values, sizes, statistics, dropout, compilation.

What one API computes the other does to the last bit (`test_apis`), so values and refusals at the call are tested in
one; what each does in its own way, such as state, random keys and loops, in both.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flashbutterfly_jax as fb
from flashbutterfly_jax.models.checks import check_choice
from tests.layers import transcription
from tests.layers.modules import APIS, Model
from tests.tolerances import LAYER

L, D, K, C, LAYERS = 16, 4, 16, 2, 2
RNG = np.random.default_rng(0)
PIXELS = RNG.normal(size=(3, L, 2)).astype(np.float32)
PAIRS = RNG.normal(size=(3, 2, L, 2)).astype(np.float32)
TOKENS = RNG.integers(0, 7, (3, L))


def make(api, x=PIXELS, *, layer=(), **arguments):
    layer = functools.partial(
        getattr(fb, api).LongConv,
        **{"channels": C, "kernel_init": fb.initializers.random(0.3), "squash_threshold": 0.1, **dict(layer)},
    )
    sizes = {"num_classes": 5, "features": D, "num_layers": LAYERS, "kernel_length": K, "input_features": 2}
    return Model(api, "SequenceClassifier", x, layer=layer, **{**sizes, **arguments})


@pytest.mark.parametrize(
    ("x", "decoder", "lengths", "norm", "prenorm"),
    [
        (PIXELS, "mean", None, "layer", False),
        (PIXELS, "mean", [4, 16, 9], "batch", True),
        (PIXELS, "last", [4, 16, 9], "layer", True),
        (PIXELS, "last", None, "batch", False),
        (TOKENS, "mean", [4, 16, 9], "layer", False),
        (PAIRS, "retrieval", [[4, 5], [16, 1], [9, 9]], "batch", True),
    ],
    ids=["mean", "mean-lengths", "last-lengths", "last", "tokens", "retrieval"],
)
def test_reproduces_the_method_written_out(x, decoder, lengths, norm, prenorm):
    vocab = {"vocab_size": 7} if x is TOKENS else {}
    model = make("linen", x, norm=norm, prenorm=prenorm, decoder=decoder, **vocab)
    lengths = None if lengths is None else np.array(lengths)
    want = transcription.classifier(
        model.params,
        x,
        channels=C,
        num_layers=LAYERS,
        prenorm=prenorm,
        norm=norm,
        decoder=decoder,
        threshold=0.1,
        lengths=lengths,
    )
    got = model(x, lengths=lengths, deterministic=norm == "layer")  # batch statistics are those of training
    assert got.shape == (3, 5)
    assert transcription.error(got, want) < LAYER["float32"]


def test_unrolled_layers_compute_the_same():
    scanned, unrolled = make("linen"), make("linen", scan_layers=False)
    got, want = unrolled(PIXELS, scanned.params), scanned(PIXELS)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)  # 1.2e-7


@pytest.mark.parametrize("api", APIS)
def test_a_scanned_model_is_compiled_once_whatever_the_depth(api):
    """Counted in the lines of the program that XLA gets to compile."""

    def size(depth, scan_layers):
        arguments = {"num_classes": 5, "features": D, "num_layers": depth, "kernel_length": K}
        if api == "linen":
            model = fb.linen.SequenceClassifier(**arguments, scan_layers=scan_layers)
            variables = jax.eval_shape(model.init, jax.random.key(0), PIXELS[..., :1])
            return len(jax.jit(model.apply).lower(variables, PIXELS[..., :1]).as_text().splitlines())
        model = fb.nnx.SequenceClassifier(**arguments, scan_layers=scan_layers, rngs=nnx.Rngs(0))
        return len(nnx.jit(model.__class__.__call__).lower(model, PIXELS[..., :1]).as_text().splitlines())

    assert size(4, True) == size(2, True)
    assert size(4, False) > 1.5 * size(2, False)


def test_compiles_once_over_batches():
    model = make("linen")
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, x, lengths):
        return model(x, params, lengths=lengths)

    for end in (3, 9, 16):
        run(model.params, PIXELS + end, jnp.full((3,), end))


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_gradients_are_finite_and_reach_every_parameter(norm):
    model = make("linen", PAIRS, decoder="retrieval", prenorm=True, norm=norm)
    gradient = jax.grad(lambda p: jnp.square(model(PAIRS, p, deterministic=False)).sum())(model.params)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


class TestNormalisation:
    @pytest.mark.parametrize("api", APIS)
    def test_batch_statistics_include_the_padding_and_weigh_a_tenth(self, api):
        block = functools.partial(
            getattr(fb, api).ResidualBlock,
            features=2,
            layer=functools.partial(getattr(fb, api).LongConv, features=2, kernel_length=K),
            norm="batch",
            prenorm=True,
        )
        inside, lengths = PIXELS + 5, jnp.array([1, 1, 1])
        if api == "linen":
            variables = block().init(jax.random.key(0), inside, deterministic=True)
            _, after = block().apply(variables, inside, lengths=lengths, deterministic=False, mutable=["batch_stats"])
            mean, var = (after["batch_stats"]["norm"][name] for name in ("mean", "var"))
        else:
            module = block(rngs=nnx.Rngs(0))
            module(inside, lengths=lengths)
            mean, var = module.norm.mean[...], module.norm.var[...]
        np.testing.assert_allclose(mean, 0.1 * inside.mean((0, 1)), rtol=1e-5)
        np.testing.assert_allclose(var, 0.9 + 0.1 * inside.var((0, 1)), rtol=1e-5)

    def test_evaluation_uses_the_running_statistics(self):
        model = make("linen", norm="batch")
        alone = model(PIXELS[:1])
        np.testing.assert_allclose(alone, model(PIXELS)[:1], rtol=0, atol=1e-6)  # 1.2e-7
        assert np.abs(model(PIXELS[:1], deterministic=False) - model(PIXELS, deterministic=False)[:1]).max() > 1e-3


class TestDropout:
    @pytest.mark.parametrize("api", APIS)
    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_masks_hold_for_a_whole_sequence(self, api, tied):
        """A prenorm block adds exactly nothing where its branch is dropped."""
        x = np.concatenate([PIXELS, PIXELS], axis=-1)
        layer = functools.partial(getattr(fb, api).LongConv, features=4, kernel_length=K)
        arguments = {"features": 4, "layer": layer, "prenorm": True, "dropout_rate": 0.5, "tie_dropout": tied}
        block = Model(api, "ResidualBlock", x, **arguments)
        branch, dropped = block(x) - x, block(x, deterministic=False) - x
        gone = np.asarray(dropped == 0)
        assert 0 < gone.mean() < 1
        np.testing.assert_allclose(dropped[~gone], 2 * branch[~gone], rtol=1e-3, atol=1e-5)
        same = (gone == gone[:, :1]).all()
        assert same == tied
        assert not (gone == gone[:1]).all()  # each sequence has its own mask

    @pytest.mark.parametrize("api", APIS)
    @pytest.mark.parametrize("arguments", [{"dropout_rate": 0.5}, {"layer": {"kernel_dropout_rate": 0.5}}])
    def test_layers_have_masks_of_their_own(self, api, arguments):
        """Two equal layers, each around a zero stream but for its own branch, would drop alike with one key."""
        model = make(api, prenorm=True, **arguments)
        first = model(PIXELS, deterministic=False, key=1)
        np.testing.assert_array_equal(first, model(PIXELS, deterministic=False, key=1))
        assert np.abs(first - model(PIXELS, deterministic=False, key=2)).max() > 1e-3
        if api == "nnx":
            streams = nnx.state(model.module.blocks, nnx.RngKey)
            for keys in jax.tree.leaves(streams):
                assert len(np.unique(jax.random.key_data(keys), axis=0)) == LAYERS

    def test_linen_layers_draw_different_masks(self):
        """With one mask for both layers a feature would lose both branches or neither: two values, never three."""
        arguments = {"features": 64, "prenorm": True, "dropout_rate": 0.5, "layer": {"channels": 1}}
        model = make("linen", num_classes=64, **arguments)
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.params)
        params["blocks"]["layer"]["output"]["bias"] += 1  # each branch is sigmoid(1): dropped, or doubled
        params["final_norm"]["scale"] += 1
        params["head"]["kernel"] += np.eye(64, dtype=np.float32)
        logits = model(PIXELS, jax.tree.map(jnp.asarray, params), deterministic=False)
        assert [len(np.unique(np.round(row, 3))) for row in logits] == [3, 3, 3]


def test_padding_and_sequences_of_no_length_are_finite():
    for decoder in ("mean", "last"):
        model = make("linen", decoder=decoder)
        got = model(PIXELS, lengths=jnp.array([0, 3, 99]))
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[2], model(PIXELS)[2], rtol=0, atol=1e-6)


# paper.md section 6, "Parameters in layers only": millions, at the precision printed there.
RECIPES = {
    "ListOps": (4.72, 8, 128, 2048, False),
    "Text": (14.16, 6, 256, 4096, False),
    "Retrieval": (13.87, 6, 256, 4000, False),
    "Image": (12.60, 6, 512, 1024, False),
    "Pathfinder": (7.87, 6, 256, 1024, True),
    "Path-X": (102.2, 6, 256, 16384, True),
}


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_parameter_counts_of_the_published_recipes(api, recipe):
    millions, depth, features, taps, bidirectional = RECIPES[recipe]
    arguments = {"num_classes": 2, "features": features, "num_layers": depth, "kernel_length": taps}
    layer = functools.partial(getattr(fb, api).LongConv, channels=2, bidirectional=bidirectional)
    if api == "linen":
        model = fb.linen.SequenceClassifier(**arguments, layer=layer)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((8, 1))))["params"]
    else:
        module = nnx.eval_shape(lambda: fb.nnx.SequenceClassifier(**arguments, layer=layer, rngs=nnx.Rngs(0)))
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    count = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]["layer"]))
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if millions > 100 else 0.005)


class TestRefusals:
    @pytest.mark.parametrize("api", APIS)
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"num_classes": 0}, r"num_classes must be an integer >= 1; got 0"),
            ({"num_layers": 0}, r"num_layers must be an integer >= 1; got 0"),
            ({"vocab_size": 0}, r"vocab_size must be an integer >= 1; got 0"),
            ({"input_features": -1}, r"input_features must be an integer >= 1; got -1"),
            ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\); got 1.0"),
        ],
    )
    def test_at_construction(self, api, wrong, message):
        with pytest.raises(ValueError, match=message):
            make(api, **wrong)

    @pytest.mark.parametrize(
        ("check", "wrong", "message"),
        [
            ("decoder", "max", r"decoder must be one of \('mean', 'last', 'retrieval'\); got 'max'"),
            ("norm", "group", r"norm must be one of \('layer', 'batch'\); got 'group'"),
        ],
    )
    def test_unknown_choices(self, check, wrong, message):
        """Not through the modules: their type annotations already refuse these where types are checked."""
        choices = {"decoder": ("mean", "last", "retrieval"), "norm": ("layer", "batch")}
        with pytest.raises(ValueError, match=message):
            check_choice(check, wrong, choices[check])

    @pytest.mark.parametrize(
        ("model", "x", "message"),
        [
            ({}, TOKENS, r"x must have a real floating-point dtype; got int32"),
            ({}, PIXELS[..., :1], r"x must have shape \(\*B, L, 2\), the last axis being input_features; got shape"),
            ({"vocab_size": 7}, PIXELS, r"x must hold integer tokens, since vocab_size = 7; got float32"),
            ({"vocab_size": 7}, np.array(1), r"x must have shape \(\*B, L\), at least one axis; got shape \(\)"),
            ({"decoder": "retrieval"}, PIXELS, r"x must have shape \(\*B, 2, L, input_features\), two documents"),
            ({"decoder": "retrieval", "vocab_size": 7}, TOKENS, r"x must have shape \(\*B, 2, L\), two documents"),
        ],
    )
    def test_at_the_call(self, model, x, message):
        good = {"decoder": PAIRS}.get(next(iter(model), ""), PIXELS)
        if "vocab_size" in model:
            good = np.stack([TOKENS, TOKENS], 1) if "decoder" in model else TOKENS
        ready = make("linen", good, **model)
        with pytest.raises(ValueError, match=message):
            ready(x)

    def test_linen_names_deterministic_where_the_norm_needs_it(self):
        model = fb.linen.SequenceClassifier(5, D, LAYERS, K, 2, norm="batch")
        with pytest.raises(ValueError, match=r"deterministic must be True .* or False"):
            model.init(jax.random.key(0), PIXELS)
