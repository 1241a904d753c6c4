"""The butterfly transform against NumPy's FFT; its convolution against direct sums in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from flashbutterfly_jax import long_conv
from flashbutterfly_jax.functional import butterfly
from flashbutterfly_jax.functional.butterfly import RIGHT_ANGLE, Plan
from tests.parity import ParitySuite, direct_gradients, direct_sum

TOLERANCE = 3e-15  # relative L2 error in float64; the largest in this file is 8.5e-16, in 65,536 points

PLANS = [(1,), (12,), (17,), (4, 6), (5, 3), (1, 7), (2, 4, 3), (8, 4, 4), (3, 2, 5, 4), (2, 1, 3, 2), (16, 16, 16, 16)]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def error(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return np.linalg.norm((got - want).ravel()) / np.linalg.norm(want.ravel())


def complex_normal(rng, shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


class TestButterfly(ParitySuite):
    implementation = "butterfly"


class TestPlan:
    def test_spectrum_places_hold_each_frequency_once(self):
        for factors in PLANS:
            plan = Plan(factors)
            assert plan.frequencies.shape == factors
            assert sorted(plan.frequencies.ravel()) == list(range(plan.n))
        assert Plan((3, 2, 5)).frequencies[2, 1, 4] == 2 + 3 * (1 + 2 * 4)

    @pytest.mark.parametrize("order", [None, 1, 2, 3, 4])
    def test_plan_has_exactly_n_points(self, order):
        for n in [1, 2, 6, 64, 97, 360, 1000, 4096, 2**20]:
            plan = butterfly.plan(n, order)
            assert plan.n == n
            assert order in (None, plan.order)
            assert plan.factors == tuple(sorted(plan.factors, reverse=True))

    def test_plan_is_balanced(self):
        assert butterfly.plan(4096, 2) == Plan((64, 64))
        assert butterfly.plan(8192, 3) == Plan((32, 16, 16))

    def test_fast_plan_is_close_above(self):
        padding = []
        for n in [*range(1, 200), *range(1000, 100_000, 997), 2**20 + 1]:
            plan = butterfly.fast_plan(n)
            assert n <= plan.n <= 1.17 * n + 1
            padding.append(plan.n / n - 1)
        assert np.mean(padding[199:]) < 0.02

    @pytest.mark.parametrize("factors", [(), (2,) * 5, (2, 0), (2, -1), (2.0,), [2, 2], (True, 2)])
    def test_wrong_factors(self, factors):
        with pytest.raises((ValueError, TypeError), match="factor"):
            Plan(factors)

    def test_wrong_requests(self):
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            butterfly.plan(0)
        with pytest.raises(ValueError, match="order must be 1 to 4, got 5"):
            butterfly.plan(8, 5)
        with pytest.raises(ValueError, match="97 is not a product of 1 to 4 factors of at most 64"):
            butterfly.plan(97, max_factor=64)
        with pytest.raises(ValueError, match="minimum must be at least 1, got 0"):
            butterfly.fast_plan(0)


class TestTables:
    @pytest.mark.parametrize("n", [64, 1021])
    def test_blocks_are_exact_to_the_last_bits(self, n):
        k, t = np.ogrid[:n, :n]
        turns = ((4 * k + 1) * t % (4 * n)).astype(np.longdouble) / (4 * n)
        angle = -8 * np.arctan(np.longdouble(1)) * turns
        block = butterfly.dft_block(n, 0.25)
        assert np.abs(block - (np.cos(angle) + 1j * np.sin(angle))).max() < 1e-15  # 6.7e-16

    def test_a_twiddle_follows_every_frequency_of_the_block(self):
        k, m = np.ogrid[:3, :5]
        want = np.exp(-2j * np.pi * (k + 0.25) * m / 15)
        np.testing.assert_allclose(butterfly.twiddle(3, 5, 0.25), want, atol=1e-15)

    def test_tables_are_shared_and_read_only(self):
        block = butterfly.dft_block(8)
        assert block is butterfly.dft_block(8)
        with pytest.raises(ValueError, match="read-only"):
            block[0, 0] = 2

    def test_block_offset_is_a_fraction_of_a_frequency(self):
        k, t = np.ogrid[:6, :6]
        np.testing.assert_allclose(butterfly.dft_block(6, 0.25), np.exp(-2j * np.pi * (k + 0.25) * t / 6), atol=1e-14)


class TestTransform:
    @pytest.mark.parametrize("factors", PLANS)
    @pytest.mark.parametrize("shift", [0.0, RIGHT_ANGLE])
    def test_is_the_fft_permuted(self, rng, factors, shift):
        plan = Plan(factors)
        x = complex_normal(rng, (2, plan.n))
        twist = np.exp(-2j * np.pi * shift * np.arange(plan.n) / plan.n)

        @jax.jit
        def there_and_back(x):
            spectrum = butterfly.forward(x, plan, shift)
            back = butterfly.inverse(spectrum, plan, shift), butterfly.inverse(spectrum, plan, shift, real=True)
            return spectrum, butterfly.forward(x.real, plan, shift), *back

        spectrum, of_real_rows, back, real_back = there_and_back(x)
        assert error(spectrum, np.fft.fft(x * twist)[:, plan.frequencies]) < TOLERANCE
        assert error(of_real_rows, np.fft.fft(x.real * twist)[:, plan.frequencies]) < TOLERANCE
        assert error(back, x) < TOLERANCE
        assert error(real_back, x.real) < TOLERANCE

    @pytest.mark.parametrize("factors", PLANS)
    def test_half_of_the_frequencies_suffice_for_real_rows(self, rng, factors):
        plan = Plan(factors)
        x = rng.standard_normal((3, plan.n))
        half = jax.jit(lambda x: butterfly.forward(x, plan, half=True))(x)
        assert error(half, np.fft.fft(x)[:, plan.frequencies[: factors[0] // 2 + 1]]) < TOLERANCE
        assert error(jax.jit(lambda half: butterfly.inverse(half, plan, half=True))(half), x) < TOLERANCE

    def test_float32_of_a_long_row(self, rng):
        plan = Plan((32, 16, 16, 8))
        x = complex_normal(rng, plan.n).astype(np.complex64)
        got = butterfly.forward(jnp.asarray(x), plan)
        assert got.dtype == jnp.complex64
        assert error(got, np.fft.fft(x.astype(complex))[plan.frequencies]) < 6e-7  # 1.8e-7 measured

    def test_intermediate_values(self, rng):
        """A = F X, B = A * w^((k1 + shift) n2), C = B F, as the kernels have them."""
        n1, n2 = 4, 6
        plan, shift = Plan((n1, n2)), RIGHT_ANGLE
        x = rng.standard_normal((n1, n2))
        k1 = np.arange(n1)[:, None] + shift
        b = (np.exp(-2j * np.pi * k1 * np.arange(n1) / n1) @ x) * np.exp(-2j * np.pi * k1 * np.arange(n2) / (n1 * n2))
        c = b @ np.fft.fft(np.eye(n2))
        blocks, back = butterfly.dft_blocks(plan, shift), butterfly.inverse_dft_blocks(plan, shift)
        first = butterfly.forward_stage(jnp.asarray(x), plan, 0, blocks[0], shift)
        assert error(first, b) < TOLERANCE
        second = butterfly.forward_stage(first, plan, 1, blocks[1], shift)
        assert error(second, c) < TOLERANCE
        undone = butterfly.inverse_stage(second, plan, 1, back[1], shift)
        assert error(undone, b) < TOLERANCE
        assert error(butterfly.inverse_stage(undone, plan, 0, back[0], shift, real=True), x) < TOLERANCE

    def test_blocks_of_each_feature(self, rng):
        """Blocks that are not Fourier's: B[k1, n2] = T (F1 x), then F2, with F1 and F2 of each feature."""
        plan = Plan((3, 4))
        f1, f2 = complex_normal(rng, (2, 3, 3)), complex_normal(rng, (4, 4))
        x = rng.standard_normal((5, 2, 12))
        b = np.einsum("dkn,bdnm->bdkm", f1, x.reshape(5, 2, 3, 4)) * np.asarray(butterfly.twiddle(3, 4, 0.25))
        want = np.einsum("kn,bdjn->bdjk", f2, b)
        got = butterfly.forward(jnp.asarray(x), plan, 0.25, blocks=[jnp.asarray(f1), jnp.asarray(f2)])
        assert error(got, want) < TOLERANCE
        back = [np.linalg.inv(f1), np.linalg.inv(f2)]
        assert error(butterfly.inverse(got, plan, 0.25, blocks=back, real=True), x) < TOLERANCE

    def test_products_have_the_precision_asked_for(self):
        def precisions(precision):
            jaxpr = jax.make_jaxpr(lambda x: butterfly.forward(x, Plan((4, 4)), precision=precision))(jnp.ones(16))
            return {eqn.params["precision"][0] for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"}

        assert precisions(None) == {jax.lax.Precision.HIGHEST}
        assert precisions("default") == {jax.lax.Precision.DEFAULT}

    def test_wrong_requests(self):
        plan = Plan((3, 4))
        with pytest.raises(ValueError, match=r"rows of 12 points .* got shape \(11,\)"):
            butterfly.forward(jnp.ones(11), plan)
        with pytest.raises(ValueError, match=r"one block for each factor of .* got 1"):
            butterfly.forward(jnp.ones(12), plan, blocks=[butterfly.dft_block(3)])
        with pytest.raises(ValueError, match=r"half=True needs real rows and shift 0, got complex128"):
            butterfly.forward(jnp.ones(12, complex), plan, half=True)
        with pytest.raises(ValueError, match=r"half=True needs shift 0, got 0.25"):
            butterfly.inverse(jnp.ones((2, 4), complex), plan, 0.25, half=True)


# (factors, L, K, circular): order 1 to 4; K < L, lags up to n - 1; n = L and n > L. A cyclic plan has n = L.
FORMS = [
    ((13,), 13, 13, False),
    ((4, 4), 16, 15, False),
    ((4, 6), 19, 7, False),
    ((3, 2, 2, 2), 17, 16, False),
    ((5, 3), 15, 14, True),
    ((4, 2, 3), 24, 9, True),
]


class TestConvolution:
    """The explicit forward and gradients, against the definition."""

    @pytest.mark.parametrize(("factors", "length", "taps", "circular"), FORMS)
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_forward_and_gradients(self, rng, factors, length, taps, circular, bidirectional):
        plan = Plan(factors)
        taps = min(taps, plan.n - bidirectional)
        u, g = rng.standard_normal((3, 2, length)), rng.standard_normal((3, 2, 2, length))
        kernel, reverse = rng.standard_normal((2, 2, 2, taps))
        reverse = reverse if bidirectional else None

        @jax.jit
        def convolve(u, g, kernel, reverse):
            spectrum = butterfly.kernel_spectrum(kernel, plan, reverse_kernel=reverse, circular=circular)
            y = butterfly.conv_forward(u, spectrum, plan, circular=circular)
            du = butterfly.input_gradient(g, spectrum, plan, circular=circular)
            return y, du, *butterfly.kernel_gradient(u, g, plan, taps, circular=circular)

        y, du, dk, dr = convolve(u, g, kernel, reverse)
        assert error(y, direct_sum(u, kernel, reverse_kernel=reverse, circular=circular)) < TOLERANCE
        want = direct_gradients(g, u, kernel, reverse_kernel=reverse, circular=circular)
        assert error(du, want["u"]) < TOLERANCE
        assert error(dk, want["kernel"]) < TOLERANCE
        if bidirectional:
            assert error(dr, want["reverse_kernel"]) < TOLERANCE

    def test_two_rows_as_one_complex_row(self, rng):
        """The cyclic product of x1 + i x2 with real taps is y1 + i y2; the real part for conj(Z) G is dk, summed."""
        plan = Plan((4, 5))
        x, g, kernel = rng.standard_normal((2, 1, 20)), rng.standard_normal((2, 1, 20)), rng.standard_normal((1, 20))

        @jax.jit
        def packed(x, g, kernel):
            z, h = (butterfly.forward(jax.lax.complex(*rows), plan) for rows in (x, g))
            y = butterfly.inverse(z * butterfly.forward(kernel, plan), plan)
            return jnp.stack([y.real, y.imag]), butterfly.inverse(z.conj() * h, plan, real=True)

        y, dk = packed(x, g, kernel)
        assert error(y, direct_sum(x, kernel, circular=True)) < TOLERANCE
        assert error(dk, direct_gradients(g, x, kernel, circular=True)["kernel"]) < TOLERANCE

    def test_wrong_requests(self):
        plan = Plan((3, 4))
        with pytest.raises(ValueError, match=r"at most 12 taps .* got 13"):
            butterfly.kernel_spectrum(jnp.ones((1, 1, 13)), plan)
        with pytest.raises(ValueError, match="at most 11 taps, got 12"):
            butterfly.kernel_spectrum(jnp.ones((1, 1, 12)), plan, reverse_kernel=jnp.ones((1, 1, 12)))
        spectrum = butterfly.kernel_spectrum(jnp.ones((1, 1, 12)), plan)
        with pytest.raises(ValueError, match=r"at most 12 samples .* got 13"):
            butterfly.conv_forward(jnp.ones((1, 13)), spectrum, plan)
        with pytest.raises(ValueError, match=r"exactly 12 samples .* got 11"):
            butterfly.conv_forward(jnp.ones((1, 11)), spectrum, plan, circular=True)


long_conv_butterfly = functools.partial(long_conv, implementation="butterfly")


class TestLongConv:
    """What the parity suite does not ask of every implementation."""

    def test_both_circular_forms_are_used(self):
        """97 and 257 are prime: the first is one dense block, the second is padded and its taps are wrapped."""
        exact = {length: butterfly.convolution._circular_plan(length)[1] for length in (64, 97, 257, 1024)}
        assert exact == {64: True, 97: True, 257: False, 1024: True}

    def test_circular_convolution_of_a_length_without_a_cyclic_plan(self, rng):
        u, g = rng.standard_normal((2, 1, 2, 257))
        kernel, reverse = rng.standard_normal((2, 2, 300))

        @jax.jit
        def values_and_gradients(u, kernel, reverse, g):
            def convolve(u, kernel, reverse):
                return long_conv_butterfly(u, kernel, reverse_kernel=reverse, circular=True)

            y, pull_back = jax.vjp(convolve, u, kernel, reverse)
            return y, *pull_back(g)

        y, du, dk, dr = values_and_gradients(u, kernel, reverse, g)
        assert error(y, direct_sum(u, kernel, reverse_kernel=reverse, circular=True)) < TOLERANCE
        want = direct_gradients(g, u, kernel, reverse_kernel=reverse, circular=True)
        assert error(du, want["u"]) < TOLERANCE
        assert error(dk, want["kernel"]) < TOLERANCE
        assert error(dr, want["reverse_kernel"]) < TOLERANCE

    @pytest.mark.parametrize(("length", "circular"), [(5, False), (6, True)])
    def test_derivatives_forward_reverse_and_second(self, rng, length, circular):
        u, kernel, reverse = rng.standard_normal((2, 1, length)), *rng.standard_normal((2, 1, 4))

        def convolve(u, kernel, reverse):
            return long_conv_butterfly(u, kernel, reverse_kernel=reverse, circular=circular)

        check_grads(jax.jit(convolve), (u, kernel, reverse), order=2, modes=["fwd", "rev"], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("circular", [False, True])
    def test_a_nan_stays_in_its_row(self, rng, circular):
        u, kernel = rng.standard_normal((3, 2, 24)), rng.standard_normal((2, 24))
        want = long_conv_butterfly(u, kernel, circular=circular)
        u[1, 0, 5] = np.nan
        got = np.array(long_conv_butterfly(u, kernel, circular=circular))
        assert np.isnan(got[1, 0]).all()
        got[1, 0] = want[1, 0]
        np.testing.assert_array_equal(got, want)

    def test_a_nan_in_a_tap_out_of_reach_changes_nothing(self, rng):
        u, kernel = rng.standard_normal((2, 20)), rng.standard_normal((2, 30))
        want = long_conv_butterfly(u, kernel, reverse_kernel=kernel)
        ahead = kernel.copy()
        kernel[:, 20:] = ahead[:, 19:] = np.nan
        np.testing.assert_array_equal(long_conv_butterfly(u, kernel, reverse_kernel=ahead), want)

    def test_vmap(self, rng):
        u, kernel = rng.standard_normal((4, 2, 10)), rng.standard_normal((4, 2, 10))
        got = jax.vmap(long_conv_butterfly)(u, kernel)
        want = np.stack([direct_sum(*pair) for pair in zip(u, kernel, strict=True)])
        assert error(got, want) < TOLERANCE

    def test_number_of_transforms(self):
        """The channels share that of u, and the gradient of the kernel is summed over the batch before its own."""
        batch, channels, length = 7, 5, 4  # more rows than the block has

        def loss(kernel, u):
            return long_conv_butterfly(u, kernel).sum()

        def rows_of_products(jaxpr):
            for eqn in jaxpr.eqns:
                if eqn.primitive.name == "dot_general":
                    yield max(x.aval.size for x in eqn.invars) // length
                for inner in jaxprs_in_params(eqn.params):
                    yield from rows_of_products(inner)

        shapes = jnp.ones((channels, 1, length)), jnp.ones((batch, 1, length))
        rows = sum(rows_of_products(jax.make_jaxpr(jax.value_and_grad(loss))(*shapes).jaxpr))
        # One factor and one real side: two real products each for u, for y and its cotangent, for the kernel and its.
        assert rows == 2 * batch + 4 * batch * channels + 4 * channels

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    @pytest.mark.parametrize("circular", [False, True])
    @pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["batch", "features"])
    def test_a_sharded_jit_moves_nothing(self, kind, circular, spec):
        """Batch or features on 8 devices, forward and gradients. Only dk of a sharded batch is a sum over devices."""
        mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
        features = P(*spec[1:])

        def convolve(u, kernel):
            return long_conv_butterfly(u, kernel, reverse_kernel=kernel, circular=circular)

        def loss(u, kernel):
            return (convolve(u, kernel) ** 2).sum()

        with jax.set_mesh(mesh):
            u = jax.device_put(np.ones((8, 8, 96), np.float32), NamedSharding(mesh, spec))
            kernel = jax.device_put(np.ones((8, 96), np.float32), NamedSharding(mesh, features))
            arguments = (0, 1) if len(features) else 0
            compiled = [jax.jit(f).lower(u, kernel).compile() for f in (convolve, jax.grad(loss, arguments))]
            y = compiled[0](u, kernel)
        text = "".join(executable.as_text() for executable in compiled)
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)
        assert y.addressable_shards[0].data.size == y.size // 8
