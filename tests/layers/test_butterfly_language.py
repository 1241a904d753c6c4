"""Learned butterflies in a language model: they never look ahead, go on step by step, and refuse the other forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashbutterfly_jax as fb
from flashbutterfly_jax import LearnedButterfly, learned_long_conv
from flashbutterfly_jax.functional.butterfly.stream import init_state, prefill, step
from tests.layers.modules import fill

D, L = 3, 26


@pytest.mark.parametrize(("taps", "learn_inverse"), [(7, True), pytest.param(40, False, marks=pytest.mark.slow)])
def test_steps_are_the_whole(taps, learn_inverse):
    """Wherever prefill ends and steps begin, with blocks that are not Fourier's."""
    butterfly = LearnedButterfly("causal", (3, 2), learn_inverse=learn_inverse)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        blocks = butterfly.init(jax.random.key(0), D, taps, "float64")
        blocks = jax.tree.map(lambda block: block + 0.5 * rng.normal(size=block.shape), blocks)
        kernel, skip, u = (jnp.asarray(rng.normal(size=shape)) for shape in ((D, taps), (D,), (2, D, L)))
        want = learned_long_conv(u, kernel, skip, blocks=blocks, butterfly=butterfly)
        parameters = kernel, skip, blocks
        state = init_state(butterfly, (2, D), taps, L, "float64")

        @jax.jit
        def steps(state, u):
            def one(state, u_t):
                y, state = step(u_t, state, *parameters, butterfly=butterfly)
                return state, y

            return jax.lax.scan(one, state, jnp.moveaxis(u, -1, 0))[1]

        @functools.partial(jax.jit, static_argnames="length")
        def start(u, length):
            return prefill(u[..., :length], state, *parameters, butterfly=butterfly)

        assert error(jnp.moveaxis(steps(state, u), 0, -1), want) < 5e-15  # 9e-16
        for length in (5, 12):  # within the first block, and at the end of the second
            y, after = start(u, length)
            assert error(y, want[..., :length]) < 5e-15
            rest = jnp.moveaxis(steps(after, u[..., length:]), 0, -1)
            assert error(rest, want[..., length:]) < 5e-15


@pytest.fixture(scope="module")
def model():
    mixer = functools.partial(
        fb.linen.H3LongConv,
        kernel_length=L,
        squash_threshold=0.1,
        kernel_init=fb.initializers.random(0.4),
        butterfly=LearnedButterfly("causal", (3, 2)),
    )
    return fb.linen.LanguageModel(vocab_size=11, features=8, num_layers=2, mixer=mixer, mlp=fb.linen.ButterflyMLP)


@pytest.fixture(scope="module")
def variables(model):
    """None as at first."""
    return fill(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, L), int))))


class TestModel:
    def test_never_looks_ahead(self, model, variables):
        """By the gradient of each position's logits by each position's embedding, and by other tokens."""
        apply = jax.jit(lambda tokens: model.apply(variables, tokens))
        rng = np.random.default_rng(0)
        tokens = jnp.asarray(rng.integers(0, 11, (1, L)))
        logits = apply(tokens)
        for t in (1, 6, 11, 20):
            changed = apply(tokens.at[:, t:].set((tokens[:, t:] + 1) % 11))
            scale = np.abs(logits).max()
            assert np.abs(changed - logits)[:, :t].max() < 1e-5 * scale  # 3e-7
            assert np.abs(changed - logits)[:, t:].max() > 1e-2 * scale

    @pytest.mark.slow
    def test_generates_what_it_computes_at_once(self, model, variables):
        tokens = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, L)))
        want = jax.jit(lambda tokens: model.apply(variables, tokens))(tokens)

        @jax.jit
        def in_steps(tokens):
            cache = model.apply(variables, 2, L, method="init_cache")
            logits, cache = model.apply(variables, tokens[:, :8], cache, method="prefill")

            def one(cache, token):
                logits, cache = model.apply(variables, token, cache, method="step")
                return cache, logits

            rest = jax.lax.scan(one, cache, tokens[:, 8:].T)[1]
            return jnp.concatenate([logits, rest.swapaxes(0, 1)], 1)

        np.testing.assert_allclose(in_steps(tokens), want, atol=2e-5 * np.abs(want).max())  # 1e-6

    @pytest.mark.parametrize("form", ["right_angle", "padded"])
    def test_refuses_forms_that_look_ahead(self, form):
        with pytest.raises(ValueError, match=f"butterfly must be of the form .causal., as .* got '{form}'"):
            fb.linen.H3LongConv(features=8, kernel_length=L, butterfly=LearnedButterfly(form))
        with pytest.raises(ValueError, match=f"butterfly must be of the causal form .* got '{form}'"):
            init_state(LearnedButterfly(form), (1,), 4, 8)


def error(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()
