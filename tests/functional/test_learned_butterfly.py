"""The learned butterfly: a convolution at first, another map once its blocks move; its counts, and what is causal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from flashbutterfly_jax import LearnedButterfly
from flashbutterfly_jax.functional import butterfly
from flashbutterfly_jax.functional.butterfly import Chain, Plan, learned_long_conv
from tests.parity import direct_sum

TOLERANCE = {"float64": 5e-15, "float32": 2e-6}  # relative L2 error; measured: 9.0e-16, 5.3e-7
FORMS = ("causal", "right_angle", "padded")


@pytest.fixture(autouse=True)
def x64_compiled_fast():
    """Most of the time goes into compiling: 0.2 s for each program like this, else 0.4."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def error(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return np.linalg.norm((got - want).ravel()) / np.linalg.norm(want.ravel())


def perturbed(blocks, scale=0.3, seed=0):
    leaves, structure = jax.tree.flatten(blocks)
    moved = [leaf + scale * normal(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


def new_blocks(config, features, taps, dtype="float64"):
    return config.init(jax.random.key(0), features, taps, dtype)


CASES = {
    "one-step": ({}, 1, 1, (), "float64"),
    "channels": ({"per_stage": True}, 50, 70, (3,), "float64"),
    "float32": ({"factors": (16, 16)}, 128, 128, (2,), "float32"),
    "per-feature": ({"per_feature": True, "learn_inverse": True}, 53, 53, (), "float64"),
    "offsets": ({"offset_scale": 0.0, "learn_inverse": True, "factors": (7, 13)}, 37, 40, (2,), "float64"),
    "four-factors": ({"factors": (5, 4, 3, 2)}, 60, 60, (), "float64"),
}


FAST = ("channels", "float32")
WITH_SLOW_CASES = [
    pytest.param(*case, id=name, marks=() if name in FAST else pytest.mark.slow) for name, case in CASES.items()
]


@pytest.mark.parametrize("form", FORMS)
class TestAtInitialisation:
    @pytest.mark.parametrize(("options", "length", "taps", "channels", "dtype"), WITH_SLOW_CASES)
    def test_is_the_convolution(self, form, options, length, taps, channels, dtype):
        config = LearnedButterfly(form, **options)
        u, kernel, skip = normal(2, 3, length), normal(*channels, 3, taps), normal(*channels, 3)
        want = direct_sum(u, kernel, skip)
        arrays = [jnp.asarray(x, dtype) for x in (u, kernel, skip)]
        got = learned_long_conv(*arrays, blocks=new_blocks(config, 3, taps, dtype), butterfly=config)
        assert got.dtype == dtype
        assert error(got, want) < TOLERANCE[dtype]

    @pytest.mark.slow
    def test_gradients_are_those_of_the_convolution(self, form):
        config = LearnedButterfly(form)
        u, kernel, g = normal(2, 3, 40), normal(3, 40), normal(2, 3, 40)
        blocks = new_blocks(config, 3, 40)
        _, pull_back = jax.vjp(lambda u, k: learned_long_conv(u, k, blocks=blocks, butterfly=config), u, kernel)
        ahead = np.flip(direct_sum(np.flip(g, -1), kernel), -1)
        lags = [sum((g[..., lag:] * u[..., : 40 - lag]).sum(-1)[b] for b in range(2)) for lag in range(40)]
        for got, want in zip(pull_back(jnp.asarray(g)), (ahead, np.stack(lags, -1)), strict=True):
            assert error(got, want) < TOLERANCE["float64"]

    @pytest.mark.slow
    def test_an_activation_between_the_stages_is_used(self, form):
        config = LearnedButterfly(form)
        u, kernel = normal(2, 40), normal(2, 40)
        blocks = new_blocks(config, 2, 40)
        linear = learned_long_conv(u, kernel, blocks=blocks, butterfly=config)
        if len(config.plan(40).factors) == 1:  # nothing is between
            config = dataclasses.replace(config, factors=(4, 2))
            blocks = new_blocks(config, 2, 40)
        same, other = (dataclasses.replace(config, activation=f) for f in (lambda x: x, jnp.tanh))
        got = learned_long_conv(u, kernel, blocks=blocks, butterfly=same)
        assert error(got, linear) < TOLERANCE["float64"]
        assert error(learned_long_conv(u, kernel, blocks=blocks, butterfly=other), linear) > 0.1


@pytest.mark.parametrize("form", ["right_angle", "padded"])
def test_looks_ahead_by_a_reverse_kernel(form):
    config = LearnedButterfly(form)
    u, kernel, reverse = normal(2, 2, 33), normal(2, 2, 33), normal(2, 2, 33, seed=1)
    blocks = new_blocks(config, 2, 33)
    got = learned_long_conv(u, kernel, reverse_kernel=reverse, blocks=blocks, butterfly=config)
    assert error(got, direct_sum(u, kernel, reverse_kernel=reverse)) < TOLERANCE["float64"]


@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form):
    config = LearnedButterfly(form)
    y = learned_long_conv(
        np.zeros((0, 2, 40)), np.ones((2, 40)), blocks=config.init(jax.random.key(0), 2, 40), butterfly=config
    )
    assert y.shape == (0, 2, 40)


class TestPaperForm:
    """The authors' transform, written out after its description: natural order, blocks of 16 shared by all stages."""

    @staticmethod
    def transform(x, blocks):
        n = x.shape[-1]
        m = min(16, n)
        if n == m:
            return x @ blocks[n].T
        rows = np.einsum("km,...mr->...kr", blocks[m], x.reshape(*x.shape[:-1], m, n // m))
        rows = rows * np.exp(-2j * np.pi * np.outer(np.arange(m), np.arange(n // m)) / n)
        rest = TestPaperForm.transform(rows, blocks)  # (..., k1, k'): frequency k1 + m k'
        return rest.swapaxes(-1, -2).reshape(x.shape)

    def test_equals_it_with_any_blocks(self):
        length = 256
        config = LearnedButterfly("padded")
        assert config.plan(length).factors == (16, 16, 2)
        blocks = perturbed(new_blocks(config, 1, length))
        u, kernel = normal(3, length), normal(3, length)
        complex_blocks = {
            name: {b.shape[1]: np.asarray(b[0, ..., 0] + 1j * b[0, ..., 1]) for b in tree.values()}
            for name, tree in blocks.items()
        }
        pad = ((0, 0), (0, length))
        spectrum = self.transform(np.pad(u, pad), complex_blocks["input"])
        spectrum = spectrum * self.transform(np.pad(kernel, pad), complex_blocks["kernel"])
        want = np.fft.ifft(spectrum).real[:, :length]
        got = learned_long_conv(u, kernel, blocks=blocks, butterfly=config)
        assert error(got, want) < TOLERANCE["float64"]
        assert error(got, direct_sum(u, kernel)) > 0.1  # no convolution any more

    @pytest.mark.parametrize("copies", [1, 5])
    def test_has_680_reals_for_each_copy_with_all_sizes_up_to_16(self, copies):
        blocks = butterfly.init_blocks(jax.random.key(0), Plan((16, 8, 4, 2)), copies=copies)
        assert sum(b.size for b in jax.tree.leaves(blocks)) == 680 * copies

    @pytest.mark.parametrize(
        ("options", "reals"),
        [
            ({}, 2 * 2 * (16**2 + 8**2)),  # 2,048 points are 16, 16, 8
            ({"per_stage": True}, 2 * 2 * (16**2 + 16**2 + 8**2)),
            ({"per_feature": True}, 7 * 2 * 2 * (16**2 + 8**2)),
            ({"learn_inverse": True}, 3 * 2 * (16**2 + 8**2)),
        ],
    )
    def test_counts(self, options, reals):
        blocks = new_blocks(LearnedButterfly("padded", **options), 7, 1024)
        assert sum(b.size for b in jax.tree.leaves(blocks)) == reals

    def test_offsets_start_random_and_leave_the_dft_in_place(self):
        config = LearnedButterfly("padded", offset_scale=0.01)
        block = new_blocks(config, 1, 1024)["input"]["size_16"]
        assert 0.008 < np.std(block) < 0.012
        u, kernel = normal(1, 1024), normal(1, 1024)
        got = learned_long_conv(u, kernel, blocks=new_blocks(config, 1, 1024), butterfly=config)
        assert 1e-4 < error(got, direct_sum(u, kernel)) < 0.2


class TestCausality:
    """By the gradient of each output by each input, with blocks as far from the DFT as that is from zero."""

    LENGTH = 60

    def jacobian(self, config, length=LENGTH, taps=LENGTH):
        blocks = perturbed(new_blocks(config, 2, taps), scale=1.0)
        u, kernel = normal(2, length), normal(2, taps)
        jacobian = jax.jacrev(lambda u: learned_long_conv(u, kernel, blocks=blocks, butterfly=config).sum(0))(u)
        return np.asarray(jacobian.swapaxes(0, 1))  # (d, t, s)

    @pytest.mark.parametrize(
        "options",
        [
            {"factors": (5, 4)},
            {"per_feature": True, "per_stage": True, "learn_inverse": True, "factors": (5, 3)},
            {"activation": jnp.tanh, "factors": (16, 2)},
        ],
    )
    def test_the_causal_form_never_looks_ahead(self, options):
        config = LearnedButterfly("causal", **options)
        for length, taps in ((60, 60), (45, 17)):
            jacobian = self.jacobian(config, length, taps)
            ahead, behind = np.triu(jacobian, 1), np.tril(jacobian, -1)
            assert np.abs(behind).max() > 0.1
            assert np.abs(ahead).max() < 1e-14 * np.abs(behind).max()  # 6.7e-16: the rounding within a block
            points = config.plan(taps).n
            block = np.arange(length) // points
            assert not ahead[:, block[:, None] < block].any()  # a later block has no way back, not even by rounding

    @pytest.mark.parametrize("form", ["right_angle", "padded"])
    def test_the_others_look_ahead_once_their_blocks_move(self, form):
        config = LearnedButterfly(form)
        assert not config.causal
        assert np.abs(np.triu(self.jacobian(config), 1)).max() > 0.1

    @pytest.mark.slow
    def test_what_is_learned_reaches_every_pair_of_blocks(self):
        """Where the blocks move, all of the lower triangle moves but what lies within a block."""
        config = LearnedButterfly("causal", (4, 3))
        u, kernel = normal(1, self.LENGTH), normal(1, self.LENGTH)

        def map_of(blocks):
            return jax.jacrev(lambda u: learned_long_conv(u, kernel, blocks=blocks, butterfly=config)[0])(u)[:, 0]

        blocks = new_blocks(config, 1, self.LENGTH)
        moved = np.abs(map_of(perturbed(blocks)) - map_of(blocks)) > 1e-6
        block = np.arange(self.LENGTH) // 12
        np.testing.assert_array_equal(moved, block[:, None] > block)

    def test_what_comes_later_changes_nothing_not_even_by_being_there(self):
        config = LearnedButterfly("causal", (4, 3))
        blocks = perturbed(new_blocks(config, 1, 40))
        u, kernel = normal(1, 40), normal(1, 40)
        y = learned_long_conv(u, kernel, blocks=blocks, butterfly=config)
        short = learned_long_conv(u[:, :26], kernel, blocks=blocks, butterfly=config)
        assert error(short, y[:, :26]) < TOLERANCE["float64"]

    def test_it_depends_on_the_distance_between_blocks(self):
        """So that a sequence may be longer than any in training."""
        config = LearnedButterfly("causal", (4, 3))
        blocks = perturbed(new_blocks(config, 1, 24))
        u, kernel = normal(1, 24), normal(1, 24)
        y = learned_long_conv(u, kernel, blocks=blocks, butterfly=config)
        late = learned_long_conv(np.pad(u, ((0, 0), (36, 0))), kernel, blocks=blocks, butterfly=config)
        assert error(late[:, 36:], y) < TOLERANCE["float64"]
        assert not late[:, :36].any()


class TestGradients:
    @pytest.mark.slow
    @pytest.mark.parametrize("form", FORMS)
    def test_of_every_block(self, form):
        config = LearnedButterfly(form, (4, 3), learn_inverse=True, per_stage=True)
        taps = 12 if form == "right_angle" else 6
        blocks = perturbed(new_blocks(config, 2, taps))
        length = 20 if form == "causal" else taps
        u, kernel = normal(2, length), normal(2, taps if form != "causal" else 20)

        def loss(u, kernel, blocks):
            return (learned_long_conv(u, kernel, blocks=blocks, butterfly=config) ** 2).sum()

        check_grads(jax.jit(loss), (u, kernel, blocks), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)
        gradients = jax.jit(jax.grad(loss, 2))(u, kernel, blocks)
        assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradients))


class TestChain:
    """The explicit algebra that a kernel is checked against: against the transforms, and against autodiff."""

    N1, N2 = 8, 6

    def arguments(self):
        x, taps = (jnp.asarray(normal(rows, 2, self.N1, self.N2)) for rows in (3, 2))
        sizes = [self.N1, self.N2, self.N2, self.N1]
        blocks = [normal(n, n, seed=i) + 1j * normal(n, n, seed=9 + i) for i, n in enumerate(sizes)]
        return x, taps, Chain(*map(jnp.asarray, blocks))

    def test_forward_is_the_learned_convolution_at_a_right_angle(self):
        config = LearnedButterfly("right_angle", (self.N1, self.N2), per_stage=True, learn_inverse=True)
        plan, n = Plan((self.N1, self.N2)), self.N1 * self.N2
        blocks = perturbed(new_blocks(config, 2, n))
        stages = {
            name: butterfly.stage_blocks(tree, plan, 0.25, inverse=name == "output") for name, tree in blocks.items()
        }
        x, taps, _ = self.arguments()
        spectrum = jax.jit(butterfly.learned_reference_spectrum)(taps, stages["kernel"][0], stages["kernel"][1].T)
        chain = Chain(stages["input"][0], stages["input"][1].T, stages["output"][1].T, stages["output"][0])
        got = jax.jit(butterfly.learned_reference_forward)(x, spectrum, chain)
        u, kernel = x.reshape(3, 2, n), taps.reshape(2, 2, n)
        want = learned_long_conv(u, kernel, blocks=blocks, butterfly=config)
        assert error(got.reshape(want.shape), want) < TOLERANCE["float64"]

    def test_backward_is_autodiff(self):
        x, taps, chain = self.arguments()
        spectrum = taps + 1j * normal(*taps.shape, seed=3)
        g = jnp.asarray(normal(3, 2, 2, self.N1, self.N2, seed=4))
        got = jax.jit(butterfly.learned_reference_backward)(x, spectrum, chain, g)
        want = jax.jit(lambda g, *arrays: jax.vjp(butterfly.learned_reference_forward, *arrays)[1](g))(
            g, x, spectrum, chain
        )
        for ours, autodiff in zip(jax.tree.leaves(tuple(got)), jax.tree.leaves(want), strict=True):
            assert error(ours, autodiff.conj()) < TOLERANCE["float64"]  # of complex ones JAX gives the conjugate

    @pytest.mark.slow
    def test_backward_of_the_spectrum_is_autodiff(self):
        _, taps, chain = self.arguments()
        d_spectrum = jnp.asarray(normal(*taps.shape) + 1j * normal(*taps.shape, seed=5))
        arrays = taps, chain.f1, chain.f2
        got = jax.jit(butterfly.learned_reference_spectrum_backward)(*arrays, d_spectrum)
        want = jax.jit(lambda d, *arrays: jax.vjp(butterfly.learned_reference_spectrum, *arrays)[1](d))(
            d_spectrum.conj(), *arrays
        )
        for ours, autodiff in zip(got, want, strict=True):
            assert error(ours, autodiff.conj()) < TOLERANCE["float64"]


class TestLinear:
    @pytest.mark.parametrize(
        ("inputs", "outputs", "factors"), [(12, 12, (4, 3)), (7, 20, None), (20, 7, (5, 4)), (1, 1, None)]
    )
    def test_is_a_circular_convolution_at_first(self, inputs, outputs, factors):
        plan = butterfly.linear_plan(inputs, outputs, factors)
        blocks = butterfly.init_linear_blocks(jax.random.key(0), plan, dtype="float64")
        x, taps = normal(3, inputs), normal(plan.n)
        s = np.fft.fft(taps)[plan.frequencies].ravel()
        got = butterfly.butterfly_linear(x, jnp.stack([s.real, s.imag], -1), blocks, outputs, plan=plan)
        padded = np.pad(x, ((0, 0), (0, plan.n - inputs)))
        want = np.fft.ifft(np.fft.fft(padded) * np.fft.fft(taps)).real[:, :outputs]
        assert error(got, want) < TOLERANCE["float64"]

    @pytest.mark.slow
    def test_is_linear_and_moves_with_every_parameter(self):
        plan = Plan((4, 3))
        blocks = perturbed(butterfly.init_linear_blocks(jax.random.key(0), plan, dtype="float64"))
        diagonal = jnp.asarray(normal(12, 2))
        a, b = normal(10), normal(10, seed=1)

        @jax.jit
        def apply(x, diagonal, blocks):
            return butterfly.butterfly_linear(x, diagonal, blocks, 11, plan=plan)

        sum_of = 2 * apply(a, diagonal, blocks) + apply(b, diagonal, blocks)
        assert error(apply(2 * a + b, diagonal, blocks), sum_of) < TOLERANCE["float64"]
        check_grads(apply, (a, diagonal, blocks), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)
        gradients = jax.jit(jax.grad(lambda *p: (apply(a, *p) ** 2).sum(), (0, 1)))(diagonal, blocks)
        assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradients))

    def test_keeps_the_variance(self):
        plan = butterfly.linear_plan(100, 300)
        blocks = butterfly.init_linear_blocks(jax.random.key(0), plan)
        diagonal = butterfly.init_diagonal(jax.random.key(1), (plan.n, 2), 100)
        y = butterfly.butterfly_linear(normal(64, 100), diagonal, blocks, 300, plan=plan)
        assert 0.7 < np.var(y) < 1.4


class TestRefuses:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"factors": (4, 0)}, r"every factor must be a positive integer, got \(4, 0\)"),
            ({"offset_scale": -1.0}, r"offset_scale must be None or >= 0; got -1.0"),
        ],
    )
    def test_a_wrong_configuration(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LearnedButterfly(**arguments)

    def test_a_plan_too_short_or_too_long(self):
        with pytest.raises(ValueError, match=r"product of at least 32 for 16 taps in the form 'padded'; got \(4, 4\)"):
            LearnedButterfly("padded", (4, 4)).plan(16)
        with pytest.raises(ValueError, match=r"factors must be given for 65537 points"):
            LearnedButterfly("right_angle").plan(65537)
        with pytest.raises(ValueError, match=r"factors must have a product of at least 9 for 3 inputs and 9 outputs"):
            butterfly.linear_plan(3, 9, (4, 2))

    def test_wrong_arrays(self):
        config = LearnedButterfly("right_angle")
        blocks = new_blocks(config, 2, 16)
        u, kernel = normal(2, 16), normal(2, 16)
        for wrong, message in (
            ({"u": normal(2, 17)}, r"u must have at most 16 steps for Plan\(factors=\(16,\)\).*got 17"),
            ({"u": normal(16)}, r"u must have shape \(\*B, D, L\).* got shape \(16,\)"),
            ({"kernel": normal(3, 16)}, r"kernel must have shape .* D = 2 .* got shape \(3, 16\)"),
            ({"skip": normal(3)}, r"skip must have shape \(2,\)"),
            ({"blocks": {"input": blocks["input"]}}, r"blocks must have the shapes .*'kernel'"),
            ({"blocks": new_blocks(config, 2, 8)}, r"blocks must have the shapes .*size_16.* got .*size_8"),
        ):
            arguments = {"u": u, "kernel": kernel, "blocks": blocks, **wrong}
            with pytest.raises(ValueError, match=message):
                learned_long_conv(**arguments, butterfly=config)

    def test_a_reverse_kernel_in_the_causal_form(self):
        config = LearnedButterfly()
        u = normal(2, 16)
        with pytest.raises(ValueError, match="reverse_kernel looks ahead and must be None in the causal form"):
            learned_long_conv(u, u, reverse_kernel=u, blocks=new_blocks(config, 2, 16), butterfly=config)
