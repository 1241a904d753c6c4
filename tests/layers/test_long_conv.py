"""The layer, in both APIs: its values, its parameters, its dtypes, and what it refuses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flashbutterfly_jax as fb
from flashbutterfly_jax.models.layer import _warn_once
from tests.layers import transcription
from tests.layers.modules import APIS, Model, variables_of
from tests.tolerances import LAYER

B, L, D, K, C = 2, 24, 3, 24, 2
X = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
LARGE = {"kernel_init": fb.initializers.random(0.3), "squash_threshold": 0.1}  # taps that matter to the output


def make(api, x=X, **arguments):
    return Model(api, "LongConv", x, **{"features": D, "kernel_length": K, "channels": C, **LARGE, **arguments})


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 24]])
@pytest.mark.parametrize(("taps", "width"), [(K, 1), (7, 5), (40, 3)])
def test_reproduces_the_method_written_out(api, bidirectional, lengths, taps, width):
    layer = make(api, bidirectional=bidirectional, smooth_width=width, kernel_length=taps, squash_threshold=0.05)
    assert layer.params["kernel"].shape == (C * (1 + bidirectional), D, taps)
    want = transcription.long_conv_layer(
        layer.params, X, channels=C, bidirectional=bidirectional, threshold=0.05, width=width, lengths=lengths
    )
    got = layer(X, lengths=None if lengths is None else jnp.array(lengths))
    assert transcription.error(got, want) < LAYER["float32"]


@pytest.mark.parametrize("api", APIS)
def test_reproduces_the_method_in_float64(api):
    with jax.enable_x64(True):
        x = X.astype(np.float64)
        layer = make(api, x, bidirectional=True, param_dtype=jnp.float64)
        want = transcription.long_conv_layer(layer.params, x, channels=C, bidirectional=True, threshold=0.1)
        got = layer(x)
        assert got.dtype == np.float64
        assert transcription.error(got, want) < LAYER["float64"]


@pytest.mark.parametrize("api", APIS)
def test_bfloat16_computes_in_bfloat16_and_squashes_in_float32(api):
    seen = []
    layer = make(api, dtype=jnp.bfloat16, squash_threshold=0.003, kernel_transform=lambda k: seen.append(k.dtype) or k)
    got = layer(X)
    assert got.dtype == jnp.bfloat16
    assert set(seen) == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(layer.params)} == {jnp.dtype(jnp.float32)}
    want = transcription.long_conv_layer(layer.params, X, channels=C)
    assert transcription.error(got, want) < LAYER["bfloat16"]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("x", "param", "want"), [("bfloat16", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16")]
)
def test_without_dtype_the_input_and_the_parameters_promote(api, x, param, want):
    layer = make(api, param_dtype=jnp.dtype(param))
    assert layer(X.astype(jnp.dtype(x))).dtype == jnp.dtype(want)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_any_number_of_batch_axes(api, batch):
    x = np.random.default_rng(1).normal(size=(*batch, L, D)).astype(np.float32)
    lengths = np.random.default_rng(2).integers(0, L + 1, batch)
    layer = make(api)
    got = layer(x, lengths=jnp.asarray(lengths))
    assert got.shape == x.shape
    for where in np.ndindex(batch):
        alone = layer(x[where], lengths=jnp.asarray(lengths[where]))
        np.testing.assert_allclose(got[where], alone, rtol=0, atol=2e-6)  # 4.8e-7: XLA tiles the products by shape


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("taps", [K, 3 * K])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_looks_ahead_only_where_bidirectional(api, taps, bidirectional):
    """By the gradient of each output by each input, also where the kernel is longer than the sequence."""
    layer = make(api, kernel_length=taps, bidirectional=bidirectional)
    jacobian = jax.jacrev(lambda x: layer(x).sum(-1))(jnp.asarray(X[0]))  # (t, s, d)
    size = np.abs(jacobian).max(-1)
    ahead, behind = np.triu(size, 1).max(), np.tril(size, -1).max()
    assert behind > 1e-2
    if bidirectional:
        assert ahead > 1e-2
    else:
        assert ahead < 1e-6 * behind  # 8.1e-8: the rounding of an FFT is not confined to the past


@pytest.mark.parametrize("api", APIS)
def test_padding_has_no_influence(api):
    layer, lengths = make(api, bidirectional=True), jnp.array([9, 24])
    inside = np.arange(L) < np.asarray(lengths)[:, None]
    other = np.where(inside[..., None], X, np.nan).astype(np.float32)
    got = layer(other, lengths=lengths)
    np.testing.assert_array_equal(got, layer(X, lengths=lengths))
    assert np.abs(got - layer(X))[0, :9].max() > 1e-3  # the reverse kernel would have seen the padding
    cut = layer(X[:1, :9])
    np.testing.assert_allclose(got[0, :9], cut[0], rtol=0, atol=2e-6)  # 2.4e-7


@pytest.mark.parametrize("api", APIS)
def test_kernel_transform_replaces_the_default(api):
    layer = make(api, squash_threshold=0.003, kernel_transform=lambda k: fb.squash(2 * k, 0.5))
    doubled = {**layer.params, "kernel": 2 * layer.params["kernel"]}
    want = transcription.long_conv_layer(doubled, X, channels=C, threshold=0.5)
    assert transcription.error(layer(X), want) < LAYER["float32"]


class TestDropout:
    @pytest.mark.parametrize("api", APIS)
    def test_evaluation_leaves_both_out(self, api):
        with_dropout = make(api, dropout_rate=0.5, kernel_dropout_rate=0.5)
        without = make(api)
        np.testing.assert_array_equal(with_dropout(X, without.params), without(X))

    @pytest.mark.parametrize("api", APIS)
    @pytest.mark.parametrize("which", ["dropout_rate", "kernel_dropout_rate"])
    def test_training_depends_on_the_key_alone(self, api, which):
        layer = make(api, **{which: 0.5})
        first, again, other = (layer(X, deterministic=False, key=key) for key in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1e-3

    @pytest.mark.parametrize("api", APIS)
    def test_the_batch_shares_the_kernel_mask(self, api):
        layer = make(api, kernel_dropout_rate=0.5)
        y = layer(np.stack([X[0], X[0]]), deterministic=False)
        np.testing.assert_array_equal(y[0], y[1])

    @pytest.mark.parametrize("api", APIS)
    def test_the_batch_does_not_share_the_inner_mask(self, api):
        layer = make(api, dropout_rate=0.5)
        y = layer(np.stack([X[0], X[0]]), deterministic=False)
        assert np.abs(y[0] - y[1]).max() > 1e-3

    @pytest.mark.parametrize("api", APIS)
    def test_kernel_dropout_scales_what_it_keeps(self, api):
        """With a delta for input and everything after the convolution undone, the taps can be read off."""
        taps = 64
        layer = make(api, kernel_dropout_rate=0.25, kernel_length=taps, features=1, channels=1, x=np.ones((1, taps, 1)))
        params = {
            "kernel": jnp.full((1, 1, taps), 30.1),  # 30 after squash, 40 after dropout: where GELU is the identity
            "skip": jnp.zeros((1, 1)),
            "output": {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.array([0.0, 50.0])},
        }
        delta = np.zeros((1, taps, 1), np.float32)
        delta[0, 0] = 1
        read = np.asarray(layer(delta, params, deterministic=False))[0, :, 0]
        assert set(np.round(read, 3)) == {0, 40}
        assert 0.5 < np.mean(read > 0) < 0.95

    def test_linen_asks_for_deterministic_only_where_it_matters(self):
        variables = make("linen").variables
        fb.linen.LongConv(features=D, kernel_length=K).apply(variables, X)
        with pytest.raises(ValueError, match=r"deterministic must be True .* or False .* got None"):
            fb.linen.LongConv(features=D, kernel_length=K, dropout_rate=0.1).apply(variables, X)
        fb.linen.LongConv(features=D, kernel_length=K, dropout_rate=0.1, deterministic=True).apply(variables, X)

    def test_nnx_eval_switches_it_off(self):
        layer = fb.nnx.LongConv(D, K, dropout_rate=0.5, kernel_dropout_rate=0.5, rngs=nnx.Rngs(0), **LARGE)
        assert np.abs(layer(X) - layer(X)).max() > 1e-3
        layer.eval()
        np.testing.assert_array_equal(layer(X), layer(X))

    def test_nnx_needs_a_dropout_stream_only_for_dropout(self):
        fb.nnx.LongConv(D, K, rngs=nnx.Rngs(params=0))(X)
        with pytest.raises(Exception, match="dropout"):
            fb.nnx.LongConv(D, K, dropout_rate=0.1, rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize("api", APIS)
def test_every_gradient_is_finite_and_none_is_zero(api):
    layer = make(api, bidirectional=True)
    gradient = jax.grad(lambda params: jnp.square(layer(X, params)).sum())(layer.params)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
    dead = np.abs(layer.params["kernel"]) <= LARGE["squash_threshold"]
    assert dead.any()
    assert (np.asarray(gradient["kernel"])[dead] == 0).all()


@pytest.mark.parametrize("api", APIS)
def test_compiles_once(api):
    layer = make(api)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, x, lengths):
        return layer(x, params, lengths=lengths)

    for end in (3, 9, 24):
        run(layer.params, X + end, jnp.array([end, end]))


@pytest.mark.parametrize("api", APIS)
def test_initial_values(api):
    """Standard deviations and ranges of the paper's code; sizes at which chance stays within 5 %."""
    arguments = {"features": 64, "kernel_length": 256, "channels": 2}
    if api == "linen":
        params = fb.linen.LongConv(**arguments).init(jax.random.key(0), np.ones((4, 64)))["params"]
    else:
        params = variables_of(fb.nnx.LongConv(**arguments, rngs=nnx.Rngs(0)))["params"]
    assert np.std(params["kernel"]) == pytest.approx(0.002, rel=0.05)
    assert np.std(params["skip"]) == pytest.approx(1, rel=0.15)
    for leaf in jax.tree.leaves(params["output"]):
        assert 0.95 / np.sqrt(128) < np.abs(leaf).max() <= 1 / np.sqrt(128)
        assert np.std(leaf) == pytest.approx(1 / np.sqrt(3 * 128), rel=0.15)


class TestWarning:
    @pytest.fixture(autouse=True)
    def _as_if_never_warned(self):
        _warn_once.cache_clear()

    @pytest.mark.parametrize("api", APIS)
    def test_a_threshold_that_kills_the_kernel_draws_one_warning(self, api):
        with pytest.warns(UserWarning, match="alive at initialisation") as caught:
            layer = Model(api, "LongConv", X, features=D, kernel_length=K, squash_threshold=0.1)
        assert len(caught) == 1
        _warn_once.cache_clear()
        layer(X)  # which initialises nothing: a warning here would be an error

    @pytest.mark.parametrize("api", APIS)
    def test_a_whole_model_draws_one_warning_however_deep(self, api):
        layer = functools.partial(getattr(fb, api).LongConv, squash_threshold=0.1)
        sizes = {"num_classes": 2, "features": 4, "num_layers": 3, "kernel_length": 8}
        with pytest.warns(UserWarning, match="alive at initialisation") as caught:
            Model(api, "SequenceClassifier", X[..., :1], layer=layer, **sizes)
        assert len(caught) == 1

    @pytest.mark.parametrize("api", APIS)
    def test_the_defaults_and_a_replaced_transform_draw_none(self, api):
        Model(api, "LongConv", X, features=D, kernel_length=K)
        Model(api, "LongConv", X, features=D, kernel_length=K, kernel_transform=lambda k: k * 0)


class TestRefusals:
    @pytest.mark.parametrize("api", APIS)
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"features": 0}, r"features must be an integer >= 1; got 0"),
            ({"kernel_length": 0}, r"kernel_length must be an integer >= 1; got 0"),
            ({"channels": -1}, r"channels must be an integer >= 1; got -1"),
            ({"smooth_width": 4}, r"smooth_width must be odd, .* got 4"),
            ({"smooth_width": 0}, r"smooth_width must be an integer >= 1; got 0"),
            ({"squash_threshold": -0.1}, r"squash_threshold must be >= 0; got -0.1"),
            ({"squash_threshold": float("nan")}, r"squash_threshold must be >= 0; got nan"),
            ({"kernel_dropout_rate": 1.0}, r"kernel_dropout_rate must be in \[0, 1\); got 1.0"),
            ({"dropout_rate": -0.5}, r"dropout_rate must be in \[0, 1\); got -0.5"),
            (
                {"kernel_transform": abs, "squash_threshold": 0.01},
                r"kernel_transform replaces .* got smooth_width, squash_threshold, kernel_dropout_rate = \(1, 0.01,",
            ),
        ],
    )
    def test_at_construction(self, api, wrong, message):
        arguments = {"features": D, "kernel_length": K, **wrong}
        rngs = {} if api == "linen" else {"rngs": nnx.Rngs(0)}
        with pytest.raises(ValueError, match=message):
            getattr(fb, api).LongConv(**arguments, **rngs)

    @pytest.mark.parametrize("api", APIS)
    @pytest.mark.parametrize(
        ("x", "lengths", "message"),
        [
            (np.ones((B, L, D + 1), np.float32), None, r"x must have shape \(\*B, L, 3\).* got shape \(2, 24, 4\)"),
            (np.ones((D,), np.float32), None, r"x must have shape \(\*B, L, 3\).* got shape \(3,\)"),
            (X, np.ones((B + 1,), np.int32), r"lengths must be integers of shape \(2,\).* int32 of shape \(3,\)"),
            (X, np.ones((), np.int32), r"lengths must be integers of shape \(2,\).* int32 of shape \(\)"),
        ],
    )
    def test_at_the_call(self, api, x, lengths, message):
        layer = make(api)
        with pytest.raises(ValueError, match=message):
            layer(jnp.asarray(x), lengths=None if lengths is None else jnp.asarray(lengths))
