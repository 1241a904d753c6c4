"""Parameters from the authors' PyTorch layer, against a NumPy transcription of its forward."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

import flashbutterfly_jax as fb
from tests.layers.transcription import error
from tests.tolerances import LAYER

C, H, L, LAM = 2, 3, 16, 0.2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, L, H)).astype(np.float32)


def state_dict(version="model", *, bidirectional=False):
    """The names and shapes that torch's ``layer.state_dict()`` has."""
    rows, taps, name = {
        "model": (C * (1 + bidirectional), L, "kernel.kernel"),
        "standalone": (C, 2 * L, "kernel"),
    }[version]
    shapes = {
        "D": (C, H),
        name: (rows, H, taps),
        "output_linear.0.weight": (2 * H, C * H),
        "output_linear.0.bias": (2 * H,),
    }
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def forward(state, x, *, bidirectional):
    """Theirs: the kernel padded to n = 2L, FFTs, skip, channels flattened, GELU, linear, GLU."""
    state = {name: value.astype(np.float64) for name, value in state.items()}
    u = x.astype(np.float64).transpose(0, 2, 1)
    kernel = state.get("kernel.kernel", state.get("kernel"))
    kernel = np.maximum(np.abs(kernel) - LAM, 0) * np.sign(kernel)
    if bidirectional:
        k0, k1 = kernel.reshape(2, C, H, L)
        kernel = np.pad(k0, ((0, 0), (0, 0), (0, L))) + np.pad(k1[..., ::-1], ((0, 0), (0, 0), (L, 0)))
    spectrum = np.einsum("bhl,chl->bchl", np.fft.rfft(u, 2 * L), np.fft.rfft(kernel, 2 * L))
    y = np.fft.irfft(spectrum, 2 * L)[..., :L] + np.einsum("bhl,ch->bchl", u, state["D"])
    h = y.reshape(len(x), C * H, L).transpose(0, 2, 1)
    h = 0.5 * h * (1 + erf(h / np.sqrt(2)))
    h = h @ state["output_linear.0.weight"].T + state["output_linear.0.bias"]
    return h[..., :H] / (1 + np.exp(-h[..., H:]))


@pytest.mark.parametrize(("version", "bidirectional"), [("model", False), ("model", True), ("standalone", True)])
def test_the_layer_computes_what_theirs_does(version, bidirectional):
    state = state_dict(version, bidirectional=bidirectional)
    params = fb.interop.from_safari(state)
    layer = fb.linen.LongConv(H, L, C, bidirectional=bidirectional, squash_threshold=LAM)
    got = layer.apply({"params": params}, X)
    want = forward(state, X, bidirectional=bidirectional and version == "model")
    assert error(got, want) < LAYER["float32"]


class Tensor:
    """What is used of a PyTorch tensor that needs a gradient and has a dtype NumPy lacks."""

    def __init__(self, value):
        self.value = value

    def __array__(self, *_, **__):
        raise TypeError("can't convert bfloat16, requires grad, on a GPU")

    def detach(self):
        return self

    cpu = float = detach

    def numpy(self):
        return self.value


def test_takes_tensors():
    state = state_dict()
    want = fb.interop.from_safari(state)
    got = fb.interop.from_safari({name: Tensor(value) for name, value in state.items()})
    assert {leaf.dtype for leaf in (got["kernel"], got["skip"])} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(got["output"]["kernel"], want["output"]["kernel"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"D": None}, r"state_dict must have the names .* missing: \['D'\], unknown: \[\]"),
        ({"block_fft_u.d": np.ones(1)}, r"unknown: \['block_fft_u.d'\]"),
        ({"D": np.ones(3)}, r"state_dict\['D'\] must have shape \(C, H\); got shape \(3,\)"),
        (
            {"output_linear.0.weight": np.ones((6, 5))},
            r"state_dict\['output_linear.0.weight'\] must have shape \(6, 6\), as .* \(2, 3\); got shape \(6, 5\)",
        ),
        ({"output_linear.0.bias": np.ones(5)}, r"\['output_linear.0.bias'\] must have shape \(6,\), as .* \(5,\)"),
        (
            {"kernel.kernel": np.ones((3, H, L))},
            r"\['kernel.kernel'\] must have shape \(2 or 4, H, L\) with H = 3, .* got shape \(3, 3, 16\)",
        ),
        ({"kernel.kernel": np.ones((2, 9, L))}, r"must have shape \(2 or 4, H, L\) with H = 3, .* \(2, 9, 16\)"),
        ({"kernel.kernel": None, "kernel": np.ones((2, H, 15))}, r"must have shape \(2, H, 2L\) .* \(2, 3, 15\)"),
    ],
)
def test_refuses_other_state_dicts(change, message):
    state = {name: value for name, value in {**state_dict(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        fb.interop.from_safari(state)
