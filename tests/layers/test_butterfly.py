"""Learned butterflies as layers, over time and over features, in both APIs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flashbutterfly_jax as fb
from flashbutterfly_jax import LearnedButterfly
from flashbutterfly_jax.optim import label_long_kernels
from tests.layers.modules import APIS, Model, fill, variables_of

D, L = 3, 24
X = np.random.default_rng(0).normal(size=(2, L, D)).astype(np.float32)
LARGE = {"kernel_init": fb.initializers.random(0.3), "squash_threshold": 0.1}
RIGHT_ANGLE = LearnedButterfly("right_angle", (6, 4), learn_inverse=True)
CAUSAL = LearnedButterfly("causal", (3, 2), per_feature=True)


def make(api, **arguments):
    return Model(api, "LongConv", X, **{"features": D, "kernel_length": L, **LARGE, **arguments})


@pytest.mark.parametrize("butterfly", [RIGHT_ANGLE, CAUSAL], ids=["right_angle", "causal"])
def test_one_tree_gives_the_same_bits(butterfly):
    bidirectional = not butterfly.causal
    layers = [make(api, butterfly=butterfly, bidirectional=bidirectional) for api in APIS]
    shapes = [jax.tree.map(jnp.shape, layer.params) for layer in layers]
    assert shapes[0] == shapes[1]
    got = [layer(X, layers[0].params, lengths=jnp.array([7, L])) for layer in layers]
    np.testing.assert_array_equal(*got)


@pytest.mark.parametrize("api", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("butterfly", [RIGHT_ANGLE, CAUSAL], ids=["right_angle", "causal"])
def test_new_blocks_leave_the_layer_as_it_is(api, butterfly):
    learned, plain = make(api, butterfly=butterfly), make(api)
    blocks = butterfly.init(jax.random.key(0), D, L)
    assert jax.tree.map(jnp.shape, learned.params["butterfly_blocks"]) == jax.tree.map(jnp.shape, blocks)
    want = plain(X)
    np.testing.assert_allclose(learned(X, {**plain.params, "butterfly_blocks": blocks}), want, atol=3e-6)  # 5e-7
    assert (
        np.abs(learned(X, {**plain.params, "butterfly_blocks": learned.params["butterfly_blocks"]}) - want).max() > 0.01
    )


def test_a_new_layer_has_new_blocks():
    """Drawn by the layers themselves."""
    x = jnp.asarray(X)
    linen = fb.linen.LongConv(D, L, **LARGE, butterfly=CAUSAL)
    params = linen.init(jax.random.key(0), x)["params"]
    other = variables_of(fb.nnx.LongConv(D, L, **LARGE, butterfly=CAUSAL, rngs=nnx.Rngs(0)))["params"]
    for tree in (params, other):
        jax.tree.map(np.testing.assert_array_equal, tree["butterfly_blocks"], CAUSAL.init(jax.random.key(1), D, L))


@pytest.mark.parametrize("butterfly", [RIGHT_ANGLE, CAUSAL], ids=["right_angle", "causal"])
def test_only_the_causal_form_keeps_the_past_to_itself(butterfly):
    """By the gradient of each output by each input, where no parameter is as at first."""
    layer = make("linen", butterfly=butterfly)
    jacobian = np.abs(jax.jacrev(lambda x: layer(x).sum(-1))(jnp.asarray(X[0]))).max(-1)  # (t, s)
    ahead, behind = np.triu(jacobian, 1).max(), np.tril(jacobian, -1).max()
    assert behind > 1e-4
    assert (ahead < 1e-6 * behind) == butterfly.causal  # 7e-8 and 0.9
    assert (ahead > 1e-2 * behind) != butterfly.causal


@pytest.mark.slow
def test_a_classifier_stacks_the_blocks_of_its_layers_and_learns_them():
    layer = functools.partial(fb.linen.LongConv, **LARGE, butterfly=RIGHT_ANGLE)
    model = fb.linen.SequenceClassifier(3, 4, 2, L, input_features=D, layer=layer)
    params = fill(jax.eval_shape(lambda: model.init(jax.random.key(0), X)))["params"]
    gradient = jax.grad(lambda params: (model.apply({"params": params}, X) ** 2).sum())(params)
    blocks = gradient["blocks"]["layer"]["butterfly_blocks"]
    assert sorted(blocks) == ["input", "kernel", "output"]
    for leaf in jax.tree.leaves(blocks):
        assert leaf.shape[0] == 2
        assert (np.abs(leaf).max((1, 2, 3, 4)) > 1e-6).all()


def test_blocks_learn_like_long_kernels():
    """At the kernels' rate and without decay, as the authors' do."""
    model = make("nnx", butterfly=CAUSAL)
    dense = Model("nnx", "ButterflyDense", X, in_features=D, features=5)
    labels = label_long_kernels({"conv": model.params, "dense": dense.params})
    assert set(jax.tree.leaves(labels["conv"]["butterfly_blocks"])) == {"long_kernel"}
    assert set(jax.tree.leaves(labels["dense"]["butterfly_blocks"])) == {"long_kernel"}
    assert (labels["conv"]["kernel"], labels["conv"]["skip"]) == ("long_kernel", "other")
    assert (labels["dense"]["diagonal"], labels["dense"]["bias"]) == ("other", "other")
    state = label_long_kernels(nnx.state(model.module, nnx.Param))
    assert set(jax.tree.leaves(state["butterfly_blocks"])) == {"long_kernel"}


class TestDense:
    @pytest.mark.parametrize("name", ["ButterflyDense", "ButterflyMLP"])
    @pytest.mark.parametrize("dtype", [None, pytest.param("bfloat16", marks=pytest.mark.slow)])
    def test_one_tree_gives_the_same_bits(self, name, dtype):
        arguments = {"features": D, "dtype": dtype, **({"hidden_features": 7} if name == "ButterflyMLP" else {})}
        only_nnx = {"in_features": D} if name == "ButterflyDense" else {}
        linen = getattr(fb.linen, name)(**arguments)
        other = getattr(fb.nnx, name)(**only_nnx, **arguments, rngs=nnx.Rngs(0))
        params = fill(jax.eval_shape(lambda: linen.init(jax.random.key(0), jnp.asarray(X))))["params"]
        assert jax.tree.map(jnp.shape, variables_of(other)["params"]) == jax.tree.map(jnp.shape, params)
        nnx.update(other, params)
        got, want = other(jnp.asarray(X)), linen.apply({"params": params}, jnp.asarray(X))
        assert got.dtype == want.dtype == (dtype or "float32")
        np.testing.assert_array_equal(got, want)

    def test_is_a_matrix_at_first_a_circulant_one(self):
        layer = fb.nnx.ButterflyDense(8, 8, use_bias=False, rngs=nnx.Rngs(0))
        matrix = np.asarray(layer(jnp.eye(8)))
        np.testing.assert_allclose(matrix[1:, 1:], matrix[:-1, :-1], atol=1e-6)
        np.testing.assert_allclose(matrix[1:, 0], matrix[:-1, -1], atol=1e-6)
        assert 0.1 < matrix.std() < 0.9  # drawn from N(0, 1/8): 0.35

    @pytest.mark.slow
    def test_the_initialiser_is_that_of_the_matrix(self):
        wide = {"kernel_init": nnx.initializers.normal(0.02), "use_bias": False}
        matrix = fb.nnx.ButterflyDense(16, 512, **wide, rngs=nnx.Rngs(0))(jnp.eye(16))
        assert 0.018 < np.std(matrix) < 0.022

    def test_counts(self):
        layer = fb.nnx.ButterflyDense(512, 512, rngs=nnx.Rngs(0))
        reals = 2 * 512 + 2 * 2 * (32**2 + 16**2) + 512  # the diagonal, two transforms, the bias
        assert sum(p.size for p in jax.tree.leaves(variables_of(layer))) == reals

    @pytest.mark.slow
    def test_replaces_the_mlp_of_a_language_model(self):
        model = functools.partial(fb.linen.LanguageModel, vocab_size=11, features=8, num_layers=1)
        mixer = functools.partial(fb.linen.H3LongConv, kernel_length=16)
        learned = model(mixer=mixer, mlp=fb.linen.ButterflyMLP)
        tokens = jnp.zeros((1, 16), int)
        variables = fill(jax.eval_shape(lambda: learned.init(jax.random.key(0), tokens)))
        assert "butterfly_blocks" in variables["params"]["layers_0"]["mlp"]["hidden"]
        assert learned.apply(variables, tokens).shape == (1, 16, 11)


@pytest.mark.parametrize("api", APIS)
class TestRefuses:
    def make(self, api, **arguments):
        rngs = {} if api == "linen" else {"rngs": nnx.Rngs(0)}
        return getattr(fb, api).LongConv(features=D, kernel_length=L, **arguments, **rngs)

    def test_looking_ahead_in_the_causal_form(self, api):
        with pytest.raises(ValueError, match=r"bidirectional must be False with a causal butterfly.*got True"):
            self.make(api, bidirectional=True, butterfly=CAUSAL)

    def test_factors_of_too_few_points(self, api):
        with pytest.raises(ValueError, match=r"factors must have a product of at least 24 for 24 taps .*got \(2, 2\)"):
            self.make(api, butterfly=LearnedButterfly("right_angle", (2, 2)))

    def test_an_implementation_without_learned_blocks(self, api):
        with pytest.raises(NotImplementedError, match=r"learned blocks need implementation=.butterfly. .*got 'xla'"):
            make(api, butterfly=CAUSAL, implementation="xla")(X)
