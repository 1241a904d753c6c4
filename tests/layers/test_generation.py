"""The choice of tokens by hand, and the loop around it: one program, the same tokens however they are asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashbutterfly_jax as fb
from flashbutterfly_jax.initializers import random
from flashbutterfly_jax.linen import H3, H3LongConv, LanguageModel
from flashbutterfly_jax.models import choose, generate, stream
from flashbutterfly_jax.models.language import check_cache
from tests.layers.modules import fill

VOCAB = 13
PROMPT = [[3, 1, 4], [1, 5, 9]]


@functools.cache
def model_and_variables():
    mixer = functools.partial(H3LongConv, kernel_length=24, squash_threshold=0.1, kernel_init=random(0.4))
    model = LanguageModel(vocab_size=VOCAB, features=8, num_layers=2, mixer=mixer, attention_layers=(1,), num_heads=2)
    params = fill(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), int)))["params"]
    # A small embedding, to which the output is tied: or else every token would be followed by itself.
    return model, {"params": params | {"embedding": 0.1 * params["embedding"]}}


def naive(model, variables, prompt, count):
    """The likeliest token of the whole sequence, again and again."""
    tokens = np.array(prompt)
    for _ in range(count):
        logits = model.apply(variables, jnp.pad(jnp.asarray(tokens), ((0, 0), (0, 20 - tokens.shape[1]))))
        tokens = np.concatenate([tokens, np.asarray(logits[:, tokens.shape[1] - 1].argmax(-1))[:, None]], axis=1)
    return tokens[:, len(prompt[0]) :]


def test_greedy_generation_is_naive_recomputation():
    model, variables = model_and_variables()
    want = naive(model, variables, PROMPT, 12)
    assert len(np.unique(want)) > 1
    np.testing.assert_array_equal(generate(model, variables, PROMPT, 12, temperature=0.0), want)


def test_streamed_tokens_are_the_same_and_everything_is_traced_once(monkeypatch):
    model, variables = model_and_variables()
    model = model.clone(init_scale=0.03)  # another model for the caches of compiled programs
    traces = []
    for name in ("prefill", "step"):
        method = getattr(LanguageModel, name)
        monkeypatch.setattr(
            LanguageModel, name, lambda *a, m=method, n=name, **k: (traces.append(n), m(*a, **k))[1], raising=True
        )
    sampling = {"temperature": 0.7, "top_k": 9, "top_p": 0.8}
    want = generate(model, variables, PROMPT, 12, seed=1, **sampling)
    generate(model, variables, PROMPT, 12, seed=2, temperature=0.1)
    whole = traces.copy()
    assert (whole.count("prefill"), whole.count("step")) == (1, 1)
    got = np.stack(list(stream(model, variables, PROMPT, 12, seed=1, **sampling)), axis=1)
    np.testing.assert_array_equal(got, want)
    assert (traces.count("prefill"), traces.count("step")) == (2, 2)


def test_seeds_and_rows_of_a_batch():
    model, variables = model_and_variables()
    both = generate(model, variables, [PROMPT[0], PROMPT[0]], 12)
    np.testing.assert_array_equal(both, generate(model, variables, [PROMPT[0], PROMPT[0]], 12))
    assert (both[0] != both[1]).any()
    assert (both != generate(model, variables, [PROMPT[0], PROMPT[0]], 12, seed=1)).any()
    # What stands beside a row does not matter to it.
    np.testing.assert_array_equal(both[0], generate(model, variables, [PROMPT[0], PROMPT[1]], 12)[0])


@jax.jit
def draws(logits, *sampling):
    keys = jax.random.split(jax.random.key(0), 4000)
    return jax.vmap(lambda key: choose(key, logits, *sampling))(keys)


def test_choice_by_hand():
    """Probabilities 0.5, 0.3, 0.15 and 0.05; 4,000 draws are within 0.03 of them."""
    logits = np.log([0.15, 0.5, 0.05, 0.3])
    cases = [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_k": 2}, [0, 5 / 8, 0, 3 / 8]),
        ({"top_p": 0.75}, [0, 5 / 8, 0, 3 / 8]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.85}, [15 / 95, 50 / 95, 0, 30 / 95]),  # 0.526 + 0.316 = 0.842 is not yet enough
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, np.square([0.15, 0.5, 0.05, 0.3]) / 0.365),
    ]
    for sampling, want in cases:
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | sampling
        got = np.bincount(draws(jnp.array(logits), *options.values()), minlength=4) / 4000
        np.testing.assert_allclose(got, want, atol=0.03, err_msg=str(sampling))
        assert not got[np.array(want) == 0].any(), sampling


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [[]]}, r"^prompt must be integers of shape \(B, P\), at least one token for each; got float64"),
        ({"prompt": [[1, 2], [3]]}, r"^prompt must have rows of one length; got rows of several\.$"),
        ({"prompt": [[1, 13]]}, r"^tokens must be from 0 to 12, those of the vocabulary; got 13 at index \(0, 1\)\.$"),
        ({"prompt": [[-1]]}, r"got -1 at index \(0, 0\)\.$"),
        ({"max_new_tokens": 0}, r"^max_new_tokens must be an integer >= 1; got 0\.$"),
        ({"temperature": -1.0}, r"^temperature must be at least 0 and finite; got -1\.0\.$"),
        ({"top_k": -1}, r"^top_k must be an integer of at least 0, and 0 keeps all tokens; got -1\.$"),
        ({"top_p": 0.0}, r"^top_p must be above 0 and at most 1; got 0\.0\.$"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_wrong_requests_are_refused_at_once(function, change, message):
    model, variables = model_and_variables()
    arguments = {"prompt": PROMPT, "max_new_tokens": 4} | change
    with pytest.raises(ValueError, match=message):
        function(model, variables, arguments.pop("prompt"), arguments.pop("max_new_tokens"), **arguments)


def test_caches_that_do_not_fit():
    model, variables = model_and_variables()
    cache = model.apply(variables, 2, 4, method="init_cache")

    def prefill(prompt, cache):
        return model.apply(variables, np.array(prompt), cache, method="prefill")

    with pytest.raises(ValueError, match=r"^tokens must be from 1 to 4, those that fit into the cache; got 5: shorten"):
        prefill([[1] * 5] * 2, cache)
    with pytest.raises(ValueError, match=r"^tokens must be for 2 sequences, as the cache is; got 1\."):
        prefill([[1]], cache)
    with pytest.raises(ValueError, match=r"^cache must be what init_cache of this model gives; got dict\."):
        check_cache({}, cache)
    others = [
        model.clone(num_layers=3),
        model.clone(mixer=H3),
        model.clone(attention_layers=()),
        model.clone(num_heads=4),
        model.clone(dtype=jnp.bfloat16),
        model.clone(mixer=functools.partial(model.mixer, kernel_length=100)),
    ]
    for other in others:
        theirs = jax.eval_shape(other.init, jax.random.key(0), jnp.zeros((1, 4), int))
        cache = other.apply(fill(theirs), 2, 70, method="init_cache")
        with pytest.raises(ValueError, match=r"^cache is one of another model: it has "):
            prefill(PROMPT, cache)


def test_a_cache_is_a_pytree():
    model, variables = model_and_variables()
    cache = model.apply(variables, 2, 8, method="init_cache")
    leaves, structure = jax.tree.flatten(cache)
    again = jax.tree.unflatten(structure, leaves)
    assert (again.batch_size, again.max_length) == (2, 8)
    assert isinstance(again, fb.models.language.Cache)
