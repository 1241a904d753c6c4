"""Language models: against a transcription in float64, causal, as large as published, and the same step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flashbutterfly_jax as fb
from flashbutterfly_jax.initializers import random
from flashbutterfly_jax.linen import H3, CausalAttention, H3LongConv, LanguageModel
from flashbutterfly_jax.models import ssm
from flashbutterfly_jax.optim import label_long_kernels
from tests.layers import h3_transcription as theirs
from tests.layers.h3_transcription import HEADS, LAYERS, STATE, TAPS, VOCAB, D
from tests.layers.modules import fill

THRESHOLD = 0.1
MIXERS = {
    "h3_conv": functools.partial(H3LongConv, kernel_length=TAPS, squash_threshold=THRESHOLD, kernel_init=random(0.4)),
    "h3": functools.partial(H3, state_size=STATE),
    "attention": functools.partial(CausalAttention, num_heads=HEADS),
    "rotary": functools.partial(CausalAttention, num_heads=HEADS, rotary=True),
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 40))


def model_of(kind, **arguments):
    """A hybrid of the mixer and attention, or a Transformer."""
    everywhere = kind in ("attention", "rotary")
    return LanguageModel(
        vocab_size=VOCAB,
        features=D,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_layers=range(LAYERS) if everywhere else (1,),
        **({"attention": functools.partial(CausalAttention, rotary=kind == "rotary")} if everywhere else {}),
        **({} if everywhere else {"mixer": MIXERS[kind]}),
        **arguments,
    )


@functools.cache
def variables_of(kind):
    return fill(jax.eval_shape(model_of(kind).init, jax.random.key(0), TOKENS))


@pytest.mark.parametrize("kind", ["h3_conv", "h3"])
def test_model_and_interop_against_float64(kind):
    """Measured: 8.1e-7 and 9.2e-7 of the largest logit."""
    arrays = theirs.state_dict(kind)
    params = fb.interop.from_h3(arrays)
    model = model_of(kind)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    got = model.apply({"params": params}, TOKENS)
    want = np.stack([theirs.logits(arrays, row, THRESHOLD) for row in TOKENS])
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def as_released(arrays):
    """The same model under the names and in the order of norms of the released checkpoints."""
    places = [f"backbone.layers.{layer}.norm{number}" for layer in range(LAYERS) for number in (1, 2)]
    old = dict(zip([*places, "backbone.ln_f"], ["backbone.ln_0", *places], strict=True))
    renamed = {}
    for name, array in arrays.items():
        prefix, _, last = name.rpartition(".")
        name = f"{old.get(prefix, prefix)}.{last}".replace("backbone.embeddings.word_embeddings", "embedding")
        renamed[name.replace("backbone.", "s4seq.encoder.", 1)] = array
    return renamed


def test_released_names_and_torch_like_tensors():
    class Tensor:
        def __init__(self, array):
            self.array = array

        detach = cpu = float = lambda self: self

        def numpy(self):
            return self.array

    arrays = theirs.state_dict("h3")
    want = fb.interop.from_h3(arrays)
    released = {name: Tensor(array) for name, array in as_released(arrays).items()}
    assert not {"backbone.ln_f.weight", "s4seq.encoder.ln_f.weight"} & released.keys()
    jax.tree.map(np.testing.assert_array_equal, fb.interop.from_h3(released), want)


def without(name, arrays):
    return {other: array for other, array in arrays.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: without("backbone.ln_f.bias", a), r"^state_dict must have 'backbone\.ln_f\.bias'; it has no such"),
        (lambda a: a | {"extra": np.ones(2)}, r"must have the names of an H3 model; got besides \['extra'\]\.$"),
        (lambda a: a | {"lm_head.weight": np.ones((VOCAB, D))}, r"^state_dict\['lm_head\.weight'\] must be the embed"),
        (
            lambda a: a | {"backbone.layers.1.mixer.Wqkv.weight": np.ones((D, 3 * D))},
            r"must have shape \(24, 8\); got shape \(8, 24\)\.$",
        ),
        (lambda a: a | {"backbone.layers.0.mixer.D": np.ones((1, D))}, r"mixer\.D'\] must have shape \(8\); got"),
    ],
)
def test_state_dicts_of_something_else(change, message):
    with pytest.raises(ValueError, match=message):
        fb.interop.from_h3(change(theirs.state_dict("h3")))


@pytest.mark.parametrize("length", [1, 63, 64, 200])
def test_diagonal_kernel_and_state_are_those_of_the_recurrence(length):
    rng = np.random.default_rng(0)
    a = np.exp(-0.05 * rng.random((3, 4)) + 1j * rng.normal(size=(3, 4)))
    b, c = (rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4)) for _ in range(2))
    model = ssm.Diagonal(*(jnp.asarray(array, jnp.complex64) for array in (a, b, c)))
    u = rng.normal(size=(2, 3, length)).astype(np.float32)
    state, kernel = np.zeros((2, 3, 4), complex), []
    for t in range(length):
        state = a * state + b * u[..., t, None]
        kernel.append(2 * (c * a**t * b).sum(-1).real)
    got = ssm.diagonal_kernel(model, length)
    np.testing.assert_allclose(got, np.stack(kernel, -1), atol=2e-4)  # 6.4e-5, of up to 10
    np.testing.assert_allclose(ssm.diagonal_state(model, jnp.asarray(u)), state, atol=2e-4)  # 4.8e-5, of up to 57


@pytest.mark.parametrize("kind", MIXERS)
def test_no_mixer_sees_the_future(kind):
    """The Jacobian of every step in every step: nothing above the diagonal beyond the rounding of FFTs.

    Measured: FFTs 4.8e-8 of the largest entry, attention 0.
    """
    module = MIXERS[kind](features=D)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, D)), jnp.float32)
    variables = fill(jax.eval_shape(module.init, jax.random.key(0), x))
    jacobian = jax.jacobian(lambda x: module.apply(variables, x)[0].sum(-1))(x)[:, 0]
    influence = np.abs(np.asarray(jacobian)).max(-1)
    assert np.triu(influence, 1).max() < 1e-5 * influence.max()
    assert np.tril(influence).sum(1).min() > 0
    assert influence[np.tril_indices(12)].min() > 1e-3 * influence.max() * (kind == "h3_conv")


@pytest.mark.parametrize("kind", ["h3_conv", "h3", "rotary"])
@pytest.mark.parametrize("prompt", [7, *(pytest.param(prompt, marks=pytest.mark.slow) for prompt in (1, 33, 39))])
def test_any_split_of_prompt_and_steps_is_the_whole_sequence(kind, prompt):
    """Measured with a prompt of 7: 8.7e-7 of the largest logit."""
    model, variables = model_of(kind), variables_of(kind)
    want = model.apply(variables, TOKENS)
    cache = model.apply(variables, 2, 40, method="init_cache")
    got, cache = model.apply(variables, TOKENS[:, :prompt], cache, method="prefill")

    def step(cache, tokens):
        logits, cache = model.apply(variables, tokens, cache, method="step")
        return cache, logits

    cache, steps = jax.jit(functools.partial(jax.lax.scan, step))(cache, TOKENS[:, prompt:].T)
    got = jnp.concatenate([got, steps.swapaxes(0, 1)], axis=1)
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()
    assert int(cache.position) == 40


def test_a_step_without_room_is_not_a_number():
    model, variables = model_of("attention"), variables_of("attention")
    cache = model.apply(variables, 1, 3, method="init_cache")
    _, cache = model.apply(variables, TOKENS[:1, :3], cache, method="prefill")
    logits, _ = model.apply(variables, TOKENS[:1, 3], cache, method="step")
    assert np.isnan(logits).all()


PUBLISHED = {"h3_conv": 155_131_392, "h3": 126_139_392}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_parameters_of_the_published_size(kind):
    """155.1M and 126.1M at the shape of 125M."""
    mixer = {"h3_conv": H3LongConv, "h3": H3}[kind]
    model = LanguageModel(vocab_size=50264, mixer=mixer, **fb.models.SIZES["125M"].arguments)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[kind]


def test_parameters_of_the_released_checkpoint():
    """126,387,456 with attention in layer 6 alone, as its authors' program prints."""
    size = fb.models.SIZES["125M"].arguments | {"attention_layers": (6,)}
    shapes = jax.eval_shape(LanguageModel(vocab_size=50264, mixer=H3, **size).init, jax.random.key(0), TOKENS)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 126_387_456


def test_initialisation():
    model = LanguageModel(vocab_size=300, features=64, num_layers=2, attention_layers=(1,), num_heads=2, init_scale=0.1)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    attention, mixer = params["layers_1"]["mixer"], params["layers_0"]["mixer"]
    deviations = {
        0.1: [params["embedding"], mixer["output"]["kernel"], attention["query"]["kernel"]],
        0.05: [attention["output"]["kernel"], params["layers_0"]["mlp"]["output"]["kernel"]],  # 0.1 / sqrt(2 * 2)
        0.002: [mixer["key_filter"]["kernel"]],
        1.0: [mixer["key_filter"]["skip"]],
    }
    for deviation, arrays in deviations.items():
        for array in arrays:
            assert np.std(array) == pytest.approx(deviation, rel=0.2 if array.ndim == 1 else 0.05)
    assert not np.any(attention["query"]["bias"])


def test_kernels_have_their_own_learning_rate():
    labels = {kind: label_long_kernels(variables_of(kind)["params"])["layers_0"] for kind in ("h3_conv", "h3")}
    of_kernels = {
        kind: {
            f"{path[-2].key}/{path[-1].key}"
            for path, label in jax.tree_util.tree_leaves_with_path(tree)
            if label == "long_kernel"
        }
        for kind, tree in labels.items()
    }
    assert of_kernels["h3_conv"] == {"key_filter/kernel", "memory_filter/kernel"}
    diagonal = {f"memory_filter/{name}" for name in ("log_decay", "frequency", "log_step", "input")}
    assert of_kernels["h3"] == {"key_filter/input"} | diagonal


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(remat):
    def gradient(model):
        return jax.jit(jax.grad(lambda params: model.apply({"params": params}, TOKENS).std()))(variables["params"])

    variables = variables_of("h3_conv")
    want = gradient(model_of("h3_conv"))
    got = gradient(model_of("h3_conv", remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    assert "prevent_cse" in str(jax.make_jaxpr(lambda v: model_of("h3_conv", remat=remat).apply(v, TOKENS))(variables))


def test_dropout_is_in_training_alone():
    model = model_of("h3_conv", dropout_rate=0.2, embedding_dropout_rate=0.1)
    variables = variables_of("h3_conv")
    with pytest.raises(ValueError, match="deterministic must be True"):
        model.apply(variables, TOKENS)
    calm = model.apply(variables, TOKENS, deterministic=True)
    np.testing.assert_array_equal(calm, model_of("h3_conv").apply(variables, TOKENS))
    noisy = [
        model.apply(variables, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 0.1
    assert np.abs(noisy[0] - calm).max() > 0.1


def test_bfloat16_keeps_the_residual_stream_and_logits_wide():
    """Measured: 1.2 % of the largest logit."""
    want = model_of("h3_conv").apply(variables_of("h3_conv"), TOKENS)
    got = model_of("h3_conv", dtype=jnp.bfloat16).apply(variables_of("h3_conv"), TOKENS)
    assert got.dtype == jnp.float32
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_nnx_bridge_has_the_same_parameters_and_bits():
    arguments = {"vocab_size": VOCAB, "features": D, "num_layers": 2, "mixer": MIXERS["h3_conv"]}
    module = fb.nnx.LanguageModel(**arguments, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    model = LanguageModel(**arguments)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_array_equal(module(TOKENS), model.apply({"params": params}, TOKENS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, r"^vocab_size must be an integer >= 1; got 0\.$"),
        ({"attention_layers": (3,)}, r"^attention_layers must be from 0 to 2, as there are 3 layers; got 3\.$"),
        ({"dropout_rate": 1.0}, r"^dropout_rate must be in \[0, 1\); got 1\.0\.$"),
    ],
)
def test_wrong_models(arguments, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(**{"vocab_size": VOCAB, "features": D, "num_layers": LAYERS} | arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CausalAttention(features=8, num_heads=3), r"^num_heads must divide features = 8; got 3\.$"),
        (lambda: CausalAttention(features=6, num_heads=2, rotary=True), r"^rotary needs an even number"),
        (lambda: fb.linen.ShiftFilter(8, 300), r"^state_size of a shift filter must be at most 256 taps; got 300\.$"),
        (lambda: fb.linen.DiagonalFilter(8, 3), r"^state_size of a diagonal filter must be even; got 3\.$"),
        (lambda: fb.linen.LongFilter(8, 4, squash_threshold=-1.0), r"^squash_threshold must be >= 0; got -1\.0\.$"),
    ],
)
def test_wrong_mixers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
