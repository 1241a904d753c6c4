"""The layer and the classifier of images, in both APIs: values, parameters, dropout, and what they refuse."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

import flashbutterfly_jax as fb
from flashbutterfly_jax.models.layer import _warn_once
from flashbutterfly_jax.optim import label_long_kernels
from tests.functional.test_long_conv_2d import direct_sum
from tests.layers.modules import APIS, Model, fill, variables_of
from tests.layers.transcription import error, normalize, to_float64
from tests.tolerances import LAYER

B, H, W, D, C = 2, 5, 6, 3, 2
X = np.random.default_rng(0).normal(size=(B, H, W, D)).astype(np.float32)
PIXELS = np.random.default_rng(1).normal(size=(B, 4, 6, 2)).astype(np.float32)
LARGE = {"kernel_init": fb.initializers.random(0.3), "squash_threshold": 0.1}  # taps that matter to the output


def make(api, x=X, **arguments):
    return Model(api, "LongConv2D", x, **{"features": D, "kernel_size": (H, W), "channels": C, **LARGE, **arguments})


def make_classifier(api, **arguments):
    layer = functools.partial(getattr(fb, api).LongConv2D, **LARGE)
    sizes = {"num_classes": 4, "features": D, "num_layers": 2, "kernel_size": (2, 3), "input_features": 2}
    return Model(api, "ImageClassifier", PIXELS, layer=layer, **{**sizes, "patch_size": 2, **arguments})


# --- The method, one line after the other, in float64 -----------------------------------------------------------------


def smooth(kernel, width):
    """The mean over a window of width x width, zeros outside."""
    half = width // 2
    padded = np.pad(kernel, ((0, 0), (0, 0), (half, half), (half, half)))
    rows, columns = kernel.shape[-2:]
    windows = (padded[..., i : i + rows, j : j + columns] for i in range(width) for j in range(width))
    return sum(windows) / width**2


def layer_written_out(params, x, *, channels, causal=(False, False), width=1, threshold=0.1):
    params = to_float64(params)
    kernel = smooth(params["kernel"], width)
    kernel = np.sign(kernel) * np.maximum(np.abs(kernel) - threshold, 0)
    quadrants = kernel.reshape(-1, channels, *kernel.shape[1:])
    quadrants = quadrants[0] if causal == (True, True) else quadrants
    u = np.moveaxis(np.asarray(x, np.float64), -1, -3)
    y = np.moveaxis(direct_sum(u, quadrants, params["skip"], causal=causal), (-4, -3), (-2, -1))
    h = y.reshape(*y.shape[:-2], -1)
    h = h * (1 + erf(h / np.sqrt(2))) / 2
    h = h @ params["output"]["kernel"] + params["output"]["bias"]
    features = x.shape[-1]
    return h[..., :features] / (1 + np.exp(-h[..., features:]))


def classifier_written_out(params, x, *, prenorm, norm):
    """Of patches of 2 x 2 pixels."""
    params = to_float64(params)
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    grid = np.zeros((len(x), rows, columns, 4 * x.shape[-1]))
    for i, j in np.ndindex(rows, columns):
        grid[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(len(x), -1)
    h = grid @ params["encoder"]["kernel"] + params["encoder"]["bias"]
    axes = (-1,) if norm == "layer" else (0, 1, 2)
    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        inside = normalize(block["norm"], h, axes) if prenorm else h
        h = h + layer_written_out(block["layer"], inside, channels=C)
        h = h if prenorm else normalize(block["norm"], h, axes)
    h = normalize(params["final_norm"], h, axes) if prenorm else h
    return h.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize(
    ("causal", "kernel_size", "width"),
    [
        ((False, False), (9, 2), 3),
        ((True, True), (H, W), 5),
        pytest.param((True, False), (9, 2), 3, marks=pytest.mark.slow),
        pytest.param((False, True), (3, 8), 1, marks=pytest.mark.slow),
    ],
)
def test_the_layer_reproduces_the_method_written_out(causal, kernel_size, width):
    layer = make("linen", causal=causal, kernel_size=kernel_size, smooth_width=width, squash_threshold=0.02)
    assert layer.params["kernel"].shape == (C * {0: 4, 1: 2, 2: 1}[sum(causal)], D, *kernel_size)
    want = layer_written_out(layer.params, X, channels=C, causal=causal, width=width, threshold=0.02)
    assert error(jax.jit(layer)(X), want) < LAYER["float32"]


def test_the_layer_reproduces_the_method_in_float64():
    with jax.enable_x64(True):
        layer = make("linen", X.astype(np.float64), param_dtype=jnp.float64)
        got = jax.jit(layer)(X.astype(np.float64))
        assert got.dtype == np.float64
        assert error(got, layer_written_out(layer.params, X, channels=C)) < LAYER["float64"]


def test_bfloat16_computes_in_bfloat16_and_squashes_in_float32():
    seen = []
    layer = make(
        "linen", dtype=jnp.bfloat16, squash_threshold=0.003, kernel_transform=lambda k: seen.append(k.dtype) or k
    )
    got = jax.jit(layer)(X)
    assert got.dtype == jnp.bfloat16
    assert set(seen) == {jnp.dtype(jnp.float32)}
    assert error(got, layer_written_out(layer.params, X, channels=C, threshold=0)) < LAYER["bfloat16"]


@pytest.mark.parametrize(("norm", "prenorm"), [("layer", False), ("batch", True)])
def test_the_classifier_reproduces_the_method_written_out(norm, prenorm):
    model = make_classifier("linen", norm=norm, prenorm=prenorm)
    want = classifier_written_out(model.params, PIXELS, prenorm=prenorm, norm=norm)
    got = jax.jit(functools.partial(model, deterministic=norm == "layer"))(
        PIXELS
    )  # batch statistics are those of training
    assert got.shape == (B, 4)
    assert error(got, want) < LAYER["float32"]


# --- Linen and NNX ---------------------------------------------------------------------------------------------------

CASES = {
    "layer": (
        "LongConv2D",
        X,
        {"features": D, "kernel_size": (H, W), "causal": (True, False), "squash_threshold": 0.0},
    ),
    "pixels": ("ImageClassifier", X, {"num_classes": 4, "features": 4, "num_layers": 2, "kernel_size": (H, W)}),
    "patches": (
        "ImageClassifier",
        PIXELS,
        {
            "num_classes": 4,
            "features": 4,
            "num_layers": 2,
            "kernel_size": (2, 3),
            "input_features": 2,
            "patch_size": 2,
            "norm": "batch",
            "prenorm": True,
            "dtype": jnp.bfloat16,
            "dropout_rate": 0.1,
        },
    ),
}


@pytest.mark.parametrize(
    "case", [*(pytest.param(case, marks=pytest.mark.slow) for case in ("layer", "pixels")), "patches"]
)
def test_one_tree_gives_the_same_bits(case):
    name, x, arguments = CASES[case]
    linen, other = getattr(fb.linen, name)(**arguments), getattr(fb.nnx, name)(**arguments, rngs=nnx.Rngs(0))
    variables = fill(jax.eval_shape(lambda: linen.init(jax.random.key(0), x, deterministic=True)))
    assert jax.tree.map(describe, variables_of(other)) == jax.tree.map(describe, variables)
    for part in variables.values():
        nnx.update(other, part)
    got, want = other(x, deterministic=True), linen.apply(variables, x, deterministic=True)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["LongConv2D", "ImageClassifier"])
def test_arguments_have_the_same_names_order_and_defaults(name):
    linen = dict(inspect.signature(getattr(fb.linen, name)).parameters)
    other = dict(inspect.signature(getattr(fb.nnx, name).__init__).parameters)
    del linen["parent"], linen["name"], other["self"], other["rngs"]
    assert list(linen) == list(other)
    for argument in set(linen) - {"deterministic", "layer"}:
        assert linen[argument].default == other[argument].default, argument


def describe(leaf):
    return leaf.shape, leaf.dtype


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
def test_tied_dropout_drops_a_feature_of_the_whole_image(api):
    """Between a layer that gives ones and a residual connection of zeros, the mask can be read off."""

    def ones(**_):
        class Ones(nnx.Module):
            def __call__(self, x, *, deterministic):
                return jnp.ones_like(x)

        class LinenOnes(fb.linen.LongConv2D):
            def __call__(self, x, *, deterministic):
                return jnp.ones_like(x)

        return Ones() if api == "nnx" else LinenOnes(features=64, kernel_size=(1, 1), name="layer")

    x = jnp.zeros((2, 3, 4, 64))
    arguments = {"features": 64, "layer": ones, "prenorm": True, "dropout_rate": 0.5, "position_axes": 2}
    mask = np.asarray(Model(api, "ResidualBlock", x, **arguments)(x, deterministic=False))
    assert (mask == mask[:, :1, :1]).all()
    assert 0.3 < (mask[:, 0, 0] == 2).mean() < 0.7
    assert (mask[0] != mask[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_kernel_dropout_and_dropout_depend_on_the_key_in_training_alone(api):
    layer = make(api, kernel_dropout_rate=0.5, dropout_rate=0.2)
    np.testing.assert_array_equal(layer(X), make(api)(X, layer.params))
    first, again, other = (layer(X, deterministic=False, key=key) for key in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_gradients_are_finite_and_reach_every_parameter_and_the_kernel_is_a_long_one():
    model = make_classifier("linen", prenorm=True)
    gradient = jax.jit(jax.grad(lambda params: jnp.square(model(PIXELS, params)).sum()))(model.params)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
    labels = jax.tree_util.tree_leaves_with_path(label_long_kernels(model.params))
    long = ["/".join(key.key for key in path) for path, label in labels if label == "long_kernel"]
    assert long == ["blocks/layer/kernel"]


@pytest.mark.slow
def test_learns_where_a_bright_pixel_is():
    """The quarter of the image; chance is 1/4. A causal layer and a mean over the image can tell by the borders."""
    model = fb.linen.ImageClassifier(
        num_classes=4,
        features=16,
        num_layers=2,
        kernel_size=(8, 8),
        input_features=1,
        layer=functools.partial(fb.linen.LongConv2D, squash_threshold=0.001),
    )
    optimizer = fb.optim.adamw(0.01, total_steps=200)

    def examples(key):
        place = jax.random.randint(key, (64, 2), 0, 8)
        images = jax.vmap(lambda at: jnp.zeros((8, 8, 1)).at[at[0], at[1]].set(8.0))(place)
        return images, 2 * (place[:, 0] // 4) + place[:, 1] // 4

    def loss_of(params, images, labels):
        logits = jax.nn.log_softmax(model.apply({"params": params}, images))
        return -jnp.take_along_axis(logits, labels[:, None], axis=-1).mean()

    @jax.jit
    def step(params, state, key):
        updates, state = optimizer.update(jax.grad(loss_of)(params, *examples(key)), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params = model.init(jax.random.key(0), examples(jax.random.key(1))[0])["params"]
    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(2), 200):
        params, state = step(params, state, key)
    images, labels = examples(jax.random.key(3))
    assert (model.apply({"params": params}, images).argmax(-1) == labels).mean() > 0.9


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("LongConv2D", {"features": 0}, r"features must be an integer >= 1; got 0"),
        (
            "LongConv2D",
            {"kernel_size": (8,)},
            r"kernel_size must be a pair, of the height and of the width; got \(8,\)",
        ),
        ("LongConv2D", {"kernel_size": (8, 0)}, r"kernel_size must be an integer >= 1; got 0"),
        ("LongConv2D", {"causal": (True,)}, r"causal must be a pair, of the height and of the width; got \(True,\)"),
        ("LongConv2D", {"smooth_width": 4}, r"smooth_width must be odd, .* got 4"),
        ("LongConv2D", {"squash_threshold": -1.0}, r"squash_threshold must be >= 0; got -1.0"),
        ("LongConv2D", {"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\); got 1.0"),
        ("LongConv2D", {"kernel_transform": abs, "smooth_width": 3}, r"kernel_transform replaces .*\(3, 0.003, 0.0\)"),
        ("LongConv2D", {"kernel_init": fb.initializers.geometric_decay()}, "kernel_init .* decays along one axis only"),
        ("ImageClassifier", {"num_classes": 0}, r"num_classes must be an integer >= 1; got 0"),
        ("ImageClassifier", {"patch_size": 0}, r"patch_size must be an integer >= 1; got 0"),
        ("ImageClassifier", {"dropout_rate": -0.1}, r"dropout_rate must be in \[0, 1\); got -0.1"),
    ],
)
def test_refuses_at_construction(api, name, wrong, message):
    arguments = {"features": D, "kernel_size": (H, W)}
    arguments |= {"num_classes": 2, "num_layers": 1} if name == "ImageClassifier" else {}
    with pytest.raises(ValueError, match=message):
        getattr(fb, api).__dict__[name](**arguments | wrong, **({} if api == "linen" else {"rngs": nnx.Rngs(0)}))


def test_refuses_at_the_call():
    layer, model = make("linen"), make_classifier("linen")
    with pytest.raises(ValueError, match=r"x must have shape \(\*B, H, W, 3\).* got shape \(2, 5, 6, 2\)"):
        layer(X[..., 1:])
    with pytest.raises(ValueError, match=r"x must have shape \(\*B, H, W, 3\).* got shape \(6, 3\)"):
        layer(X[0, 0])
    with pytest.raises(ValueError, match="x must have a real floating-point dtype; got int"):
        layer(X.astype(int))
    with pytest.raises(ValueError, match=r"H and W multiples of patch_size = 2; got shape \(2, 3, 6, 2\)"):
        model(PIXELS[:, 1:])


@pytest.mark.parametrize("api", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_a_threshold_that_kills_the_kernel_draws_a_warning(api):
    _warn_once.cache_clear()
    with pytest.warns(UserWarning, match="alive at initialisation"):
        Model(api, "LongConv2D", X, features=D, kernel_size=(H, W), squash_threshold=0.1)
    _warn_once.cache_clear()
