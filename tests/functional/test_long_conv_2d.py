"""The long convolution of images against the direct sum, and what it accepts and refuses."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbutterfly_jax import long_conv_2d, squash
from tests import tolerances
from tests.parity import relative_error

BOTH, ROWS, COLUMNS, NEITHER = (True, True), (True, False), (False, True), (False, False)
CAUSAL = {"both": BOTH, "rows": ROWS, "columns": COLUMNS, "neither": NEITHER}


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, without its numbers."""

    size: tuple[int, int]
    taps: tuple[int, int]
    causal: tuple[bool, bool]
    channels: int | None = None
    skip: bool = False
    pre_gate: bool = False
    post_gate: str | None = None  # "shared" by the channels or "own"
    batch: tuple[int, ...] = (2,)
    features: int = 2

    def __str__(self) -> str:
        (name,) = (name for name, value in CAUSAL.items() if value == self.causal)
        size, taps = ("x".join(map(str, pair)) for pair in (self.size, self.taps))
        gates = "-pre" * self.pre_gate + (f"-post_{self.post_gate}" if self.post_gate else "")
        return f"{name}-{size}-K{taps}-C{self.channels}{'-skip' * self.skip}{gates}"

    def arguments(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Its arrays in float64, of values that float16 represents exactly, so that every dtype gets the same."""
        random = np.random.default_rng(seed)

        def normal(*shape):
            return random.standard_normal(shape).astype(np.float16).astype(np.float64)

        channels = () if self.channels is None else (self.channels,)
        image = (*self.batch, self.features, *self.size)
        quadrants = {0: (4,), 1: (2,), 2: ()}[sum(self.causal)]
        arrays = {"u": normal(*image), "kernel": normal(*quadrants, *channels, self.features, *self.taps)}
        if self.skip:
            arrays["skip"] = normal(*channels, self.features)
        if self.pre_gate:
            arrays["pre_gate"] = normal(*image)
        if self.post_gate:
            own = channels if self.post_gate == "own" else ()
            arrays["post_gate"] = normal(*self.batch, *own, self.features, *self.size)
        return arrays


# (H, W), (Kh, Kw): one pixel, row or column; kernels smaller, as large, and larger than the image along either axis
SIZES = [((1, 1), (1, 1)), ((1, 1), (3, 2)), ((1, 6), (2, 9)), ((5, 1), (4, 4)), ((3, 4), (1, 1)), ((4, 7), (4, 7))]
SIZES += [((6, 5), (9, 2)), ((7, 3), (2, 8)), ((8, 8), (20, 20))]
PLAIN = [Case(size, taps, causal, 2, skip=True) for size, taps in SIZES for causal in CAUSAL.values()]
GATED = [
    Case((5, 4), (3, 6), causal, channels, True, True, post_gate)
    for causal, (channels, post_gate) in zip(
        CAUSAL.values(), [(None, "own"), (2, "shared"), (3, "own"), (None, "shared")], strict=True
    )
]
# Every size with one mode, and each mode with gates; the other pairs in the slow lane.
CASES = [
    pytest.param(case, id=str(case), marks=() if i // 4 % 4 == i % 4 else pytest.mark.slow)
    for i, case in enumerate(PLAIN)
] + [pytest.param(case, id=str(case)) for case in GATED]


def lags(taps, causal):
    """Each quadrant, tap and lag, as the docstring has it."""
    quadrants = itertools.product(*((False,) if axis else (False, True) for axis in causal))
    for q, reverse in enumerate(quadrants):
        for tap in itertools.product(range(taps[0]), range(taps[1])):
            yield q, tap, tuple(-(t + 1) if ahead else t for t, ahead in zip(tap, reverse, strict=True))


def shift(x, lag):
    """x[h - lag[0], w - lag[1]], zero outside."""
    shifted = np.zeros_like(x)
    (to_rows, from_rows), (to_columns, from_columns) = (
        (slice(max(a, 0), max(n + min(a, 0), 0)), slice(max(-a, 0), max(n - max(a, 0), 0)))
        for a, n in zip(lag, x.shape[-2:], strict=True)
    )
    shifted[..., to_rows, to_columns] = x[..., from_rows, from_columns]
    return shifted


def stacked(kernel, causal):
    """With the axis of quadrants in any case."""
    return kernel[None] if causal == BOTH else kernel


def direct_sum(u, kernel, skip=None, *, causal, pre_gate=None, post_gate=None):
    quadrants = stacked(kernel, causal)
    x = u if pre_gate is None else pre_gate * u
    if quadrants.ndim == 5:
        x = x[..., None, :, :, :]
        post_gate = post_gate[..., None, :, :, :] if post_gate is not None and post_gate.ndim == u.ndim else post_gate
    y = 0 * quadrants[0, ..., :1, :1] * x
    for q, (i, j), lag in lags(quadrants.shape[-2:], causal):
        y += quadrants[q, ..., i, j, None, None] * shift(x, lag)
    y = y if skip is None else y + skip[..., None, None] * x
    return y if post_gate is None else post_gate * y


def direct_gradients(cotangent, u, kernel, skip=None, *, causal, pre_gate=None, post_gate=None):
    """The gradient of sum(cotangent * direct_sum(...)) in each array, by name."""
    quadrants, gradients = stacked(kernel, causal), {}
    channels = quadrants.ndim == 5

    def with_channels(x):
        return x[..., None, :, :, :] if channels else x

    def without_channels(x):
        return x.sum(-4) if channels else x

    if post_gate is not None:
        ungated = direct_sum(u, kernel, skip, causal=causal, pre_gate=pre_gate)
        shared = channels and post_gate.ndim == u.ndim
        gradients["post_gate"] = without_channels(cotangent * ungated) if shared else cotangent * ungated
        cotangent = cotangent * (with_channels(post_gate) if shared else post_gate)
    x = with_channels(u if pre_gate is None else pre_gate * u)
    batch = tuple(range(cotangent.ndim - quadrants.ndim + 1))
    dx, dk = np.zeros(cotangent.shape), np.zeros(quadrants.shape)
    if skip is not None:
        gradients["skip"] = (cotangent * x).sum((*batch, -2, -1))
        dx += skip[..., None, None] * cotangent
    for q, (i, j), lag in lags(quadrants.shape[-2:], causal):
        dk[q, ..., i, j] = (cotangent * shift(x, lag)).sum((*batch, -2, -1))
        dx += quadrants[q, ..., i, j, None, None] * shift(cotangent, (-lag[0], -lag[1]))
    gradients["kernel"] = dk.reshape(kernel.shape)
    dx = without_channels(dx)
    gradients["u"] = dx if pre_gate is None else pre_gate * dx
    if pre_gate is not None:
        gradients["pre_gate"] = u * dx
    return gradients


def cast(arrays, dtype):
    """u and its gates of this dtype; kernel and skip too, but of float32 where that is wider."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return {name: jnp.asarray(x, wide if name in ("kernel", "skip") else dtype) for name, x in arrays.items()}


def check(case, dtype, implementation="xla"):
    with jax.enable_x64(dtype == "float64"):
        arrays = cast(case.arguments(), dtype)

        @jax.jit
        def values_and_gradients(arrays, cotangent):
            def convolve(arrays):
                return long_conv_2d(**arrays, causal=case.causal, implementation=implementation)

            y, pull_back = jax.vjp(convolve, arrays)
            return y, pull_back(cotangent)[0]

        exact = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
        want = direct_sum(**exact, causal=case.causal)
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(want.shape), dtype)
        y, gradients = values_and_gradients(arrays, cotangent)
        assert y.dtype == dtype
        assert relative_error(y, want) < tolerances.FORWARD[implementation][dtype]
        wanted = direct_gradients(np.asarray(cotangent, np.float64), **exact, causal=case.causal)
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == arrays[name].dtype, name
            error = relative_error(gradient, wanted[name])
            assert error < tolerances.GRADIENT[implementation][str(gradient.dtype)], name


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    check(case, "float64")


@pytest.mark.parametrize("case", GATED[2:], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrower_images_with_float32_kernels(case, dtype):
    check(case, dtype)


def test_butterfly():
    check(GATED[2], "float32", "butterfly")


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    case=st.builds(
        Case,
        size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        taps=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        causal=st.tuples(st.booleans(), st.booleans()),
        channels=st.sampled_from([None, 1, 2]),
        skip=st.booleans(),
        pre_gate=st.booleans(),
        post_gate=st.sampled_from([None, "shared", "own"]),
        batch=st.lists(st.integers(1, 2), max_size=2).map(tuple),
        features=st.integers(1, 2),
    ),
    seed=st.integers(0, 2**16),
)
@pytest.mark.slow
def test_random_requests(case, seed):
    exact = case.arguments(seed)
    got = long_conv_2d(**cast(exact, "float32"), causal=case.causal)
    # Random tiny cases can cancel, so the error is measured against what is summed.
    scale = direct_sum(**{name: np.abs(array) for name, array in exact.items()}, causal=case.causal).max()
    error = np.abs(np.asarray(got, np.float64) - direct_sum(**exact, causal=case.causal)).max()
    assert error < tolerances.FORWARD["xla"]["float32"] * scale


def test_is_the_two_dimensional_fourier_transform_of_the_zero_padded_image():
    """Causal in both axes: by the FFT of 2H x 2W points."""
    case = Case((16, 12), (16, 12), BOTH)
    arrays = case.arguments()
    size = (32, 24)
    want = np.fft.irfft2(np.fft.rfft2(arrays["u"], size) * np.fft.rfft2(arrays["kernel"], size), size)[..., :16, :12]
    got = long_conv_2d(**cast(arrays, "float32"), causal=True)
    assert relative_error(got, want) < tolerances.FORWARD["xla"]["float32"]


@pytest.mark.parametrize("causal", CAUSAL.values(), ids=CAUSAL)
def test_sees_later_rows_and_columns_only_where_not_causal(causal):
    case = Case((5, 6), (9, 9), causal, batch=(), features=1)
    arrays = cast(case.arguments(), "float32")
    jacobian = jax.jacobian(lambda u: long_conv_2d(u, arrays["kernel"], causal=causal))(arrays["u"])[0, :, :, 0]
    lag = [np.arange(n)[:, None] - np.arange(n) for n in case.size]
    ahead = [lag[0][:, None, :, None] < 0, lag[1][None, :, None, :] < 0]
    for axis, forbidden in enumerate(causal):
        largest = np.abs(np.where(ahead[axis], jacobian, 0)).max()
        assert largest < 1e-5 if forbidden else largest > 0.1
    behind = ~(ahead[0] | ahead[1])
    assert np.abs(jacobian)[np.broadcast_to(behind, jacobian.shape)].min() > 1e-3


def test_array_likes_pairs_and_bools_are_accepted():
    case = Case((3, 4), (2, 2), NEITHER)
    arrays = cast(case.arguments(), "float32")
    want = long_conv_2d(**arrays)
    lists = {name: array.tolist() for name, array in arrays.items()}
    for causal in (False, (False, False), [False, False]):
        np.testing.assert_array_equal(long_conv_2d(**lists, causal=causal), want)


def test_squash_applies_to_kernels_of_images():
    case = Case((4, 4), (4, 4), NEITHER)
    arrays = case.arguments()
    shrunk = np.sign(arrays["kernel"]) * np.maximum(np.abs(arrays["kernel"]) - 0.5, 0)
    got = long_conv_2d(np.float32(arrays["u"]), squash(np.float32(arrays["kernel"]), 0.5))
    assert relative_error(got, direct_sum(arrays["u"], shrunk, causal=NEITHER)) < tolerances.FORWARD["xla"]["float32"]


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("causal", [BOTH, NEITHER], ids=["both", "neither"])
def test_an_empty_image_gives_an_empty_result_and_zero_gradients(size, causal):
    quadrants = (4,) if causal == NEITHER else ()
    u, kernel = jnp.ones((2, 3, *size), jnp.bfloat16), jnp.ones((*quadrants, 5, 3, 2, 2))

    def total(u, kernel):
        y = long_conv_2d(u, kernel, causal=causal)
        assert y.shape == (2, 5, 3, *size)
        assert y.dtype == u.dtype
        return y.sum(dtype=jnp.float32)

    gradients = jax.grad(total, argnums=(0, 1))(u, kernel)
    assert [gradient.shape for gradient in gradients] == [u.shape, kernel.shape]
    assert not gradients[1].any()


U = np.linspace(-1, 2, 2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
KERNEL = np.linspace(1, -1, 4 * 3 * 2 * 6, dtype=np.float32).reshape(4, 3, 2, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": U[0, 0]}, r"u must have shape \(\*B, D, H, W\), at least three axes; got shape \(4, 5\)"),
        ({"u": U.astype(int)}, "u must have a real floating-point dtype; got int"),
        ({"u": None}, "u must be an array; got None"),
        ({"kernel": KERNEL[0, 0]}, r"kernel must have .* got shape \(2, 6\)"),
        ({"kernel": KERNEL[0]}, r"kernel must have shape \(4, D, Kh, Kw\) or .* 4 quadrants .* got shape \(3, 2, 6\)"),
        ({"kernel": KERNEL[:2]}, r"4 quadrants for causal = False; got shape \(2, 3, 2, 6\)"),
        ({"kernel": KERNEL, "causal": (True, False)}, r"2 quadrants for causal = \(True, False\); got shape \(4, "),
        ({"kernel": KERNEL[:, :2]}, r"D = 3 as in u of shape \(2, 3, 4, 5\)"),
        ({"kernel": KERNEL[..., :0]}, r"Kh, Kw >= 1"),
        ({"causal": 1}, "causal must be a bool, or one for the height and one for the width; got 1"),
        ({"causal": (True,)}, r"causal must be a bool, .* got \(True,\)"),
        ({"skip": KERNEL}, r"skip must have shape \(3,\), .* got shape \(4, 3, 2, 6\)"),
        ({"pre_gate": U[0]}, r"pre_gate must have shape \(2, 3, 4, 5\), .* got shape \(3, 4, 5\)"),
        ({"post_gate": U[..., :1]}, r"post_gate must have shape \(2, 3, 4, 5\), .* got shape \(2, 3, 4, 1\)"),
        ({"implementation": "xls"}, "Did you mean 'xla'"),
        ({"precision": "exact"}, "precision must be None"),
    ],
)
def test_a_wrong_request_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        long_conv_2d(**{"u": U, "kernel": KERNEL} | changes)


def test_a_named_implementation_runs_or_raises():
    with pytest.raises(NotImplementedError, match="the fused kernel multiplies 16-bit numbers"):
        long_conv_2d(U, KERNEL, implementation="mosaic_gpu", precision="highest")


def test_a_sharded_batch_stays_where_it_is():
    """On eight devices that one CPU pretends to be: no operation of the compiled program gathers."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    u = jax.ShapeDtypeStruct((8, 2, 6, 5), jnp.float32, sharding=rows)
    kernel = jax.ShapeDtypeStruct((4, 2, 6, 5), jnp.float32)
    compiled = jax.jit(long_conv_2d).lower(u, kernel).compile()
    assert compiled.output_shardings.is_equivalent_to(rows, 4)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.slow
def test_the_fused_kernel_runs_it():
    """In Pallas' interpreter."""
    from tests.kernels.interpreter import interpreted

    case = Case((7, 6), (9, 4), NEITHER, 2, skip=True, pre_gate=True, batch=(1,), features=1)
    arrays = cast(case.arguments(), "bfloat16")
    with interpreted():
        got = jax.jit(lambda arrays: long_conv_2d(**arrays, implementation="mosaic_gpu"))(arrays)
        got.block_until_ready()
    exact = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    want = direct_sum(**exact, causal=NEITHER)
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert error < tolerances.FUSED["bfloat16"]
