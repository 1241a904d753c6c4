"""Learned butterflies longer than a tile: values and every cotangent, and what is lowered for a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashbutterfly_jax import LearnedButterfly, learned_long_conv
from flashbutterfly_jax.functional.butterfly.mosaic_gpu import learned_long_conv_mosaic_gpu
from pallas_kernels.fft_conv import learned_long_api, learned_three_pass
from pallas_kernels.fft_conv.config import BLOCK, N1
from tests.kernels.interpreter import interpreted
from tests.kernels.test_learned import relative_error
from tests.kernels.test_lowering import kernels, lowered
from tests.tolerances import LEARNED_LONG


@functools.cache
def problem(m, length, taps, batch, features, dtype, uneven=False):
    """Inputs, with blocks as far from the DFT as their entries are large, and in float64 the result and cotangents.

    If uneven, the first of three features has small taps; the second large ones, but no cotangent; the third none, but
    a large cotangent.
    """
    random = np.random.default_rng(0)
    butterfly = LearnedButterfly("right_angle", (m, N1, N1), per_stage=True, learn_inverse=True)
    with jax.enable_x64(True):
        blocks = butterfly.init(jax.random.key(0), features, taps, "float64")
        blocks = jax.tree.map(lambda block: block + 0.5 * random.standard_normal(block.shape), blocks)
        u, g = (jnp.asarray(random.standard_normal((batch, features, length)), dtype) for _ in range(2))
        kernel = random.standard_normal((features, taps)).astype(np.float32)
        if uneven:
            kernel *= np.array([[1e-3], [1], [0]], np.float32)
            g *= jnp.array([[1], [0], [100]], dtype)

        @jax.jit
        def reference(g, *arguments):
            y, vjp = jax.vjp(functools.partial(_convolve, butterfly=butterfly), *arguments)
            return y, vjp(g)

        want = reference(*(x.astype("float64") for x in (g, u, kernel)), blocks)
        want = jax.tree.map(np.asarray, want)
        arguments = u, jnp.asarray(kernel), jax.tree.map(lambda block: block.astype("float32"), blocks)
    return arguments, g, butterfly, want


def _convolve(u, kernel, blocks, *, butterfly):
    return learned_long_conv(u, kernel, blocks=blocks, butterfly=butterfly)


def run(g, arguments, butterfly, grid=132):
    """The result and the cotangents of the arguments."""

    def convolve(u, kernel, blocks):
        return learned_long_conv_mosaic_gpu(u, kernel, blocks=blocks, butterfly=butterfly, config=grid)

    @jax.jit
    def both_ways(g, *arguments):
        y, vjp = jax.vjp(convolve, *arguments)
        return y, vjp(g)

    return both_ways(g, *arguments)


def check(got, want, dtype):
    assert got[0].dtype == got[1][0].dtype == dtype
    assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, want)
    errors = jax.tree.map(relative_error, got, want)
    print(errors)
    assert max(jax.tree.leaves(errors)) < LEARNED_LONG[dtype], errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "grid"),
    [
        # two rows of each of three sequences, that fill no tiles; these and the taps end early; blocks share rows
        ((2, 8000, 7000, 3, 1, "bfloat16"), 8),
        # four sequences taken for one, of u and of the taps
        ((2, 8192, 8192, 1, 4, "float16"), 4),
        # three rows of each of three sequences, which no number of sequences below eight fills tiles with
        ((3, 12000, 12288, 1, 3, "float16"), 6),
        # a sequence shorter than the taps, two features for one block
        ((4, 9000, 16384, 1, 2, "float16"), 4),
        # more rows than the sequence has tiles of
        ((5, 19000, 20480, 2, 1, "float16"), 12),
    ],
    ids=str,
)
def test_values_and_every_cotangent_with_any_blocks(case, grid):
    arguments, g, butterfly, want = problem(*case)
    with interpreted():
        got = run(g, arguments, butterfly, grid)
    check(got, want, case[-1])


def planes_of(z):
    """`(B, 1, D, re | im m, 64, 64)` of complex rows `(B, D, m, 64, 64)`."""
    return jnp.concatenate([z.real, z.imag], 2)[:, None]


def rows_of(z):
    re, im = jnp.split(z[:, 0].astype(jnp.float32), 2, 2)
    return jax.lax.complex(re, im)


def complex_of(planes):
    """Of `(..., re | im, 64, 64)`."""
    return jax.lax.complex(*jnp.moveaxis(planes.astype(jnp.float32), -3, 0))


def rows_forward(shapes):
    """`learned_rows_forward_sm90.forward` in float32."""

    def kernel(z, k, f1, f2, v1, v2, t, shift):
        k, f1, f2, v1, v2, t = map(complex_of, (k, f1[:, :2], f2, v1[:, :2], v2, t))
        c = (t * (f1 @ rows_of(z))) @ f2
        return planes_of(v1 @ (t.conj() * ((c * k) @ v2))).astype(shapes.dtype)

    return kernel


def rows_transform(shapes, dtype):
    """`learned_rows_transform_sm90.transform` in float32."""

    def kernel(z, scale, f1, f2, t, shift):
        f1, f2, t = map(complex_of, (f1[:, :2], f2, t))
        c = scale[:, None, None, None] * ((t * (f1 @ rows_of(z)[:, 0])) @ f2)
        return jnp.stack([c.real, c.imag], 2).astype(dtype)

    return kernel


def rows_backward(shapes):
    """`learned_rows_backward_sm90.backward` in float32."""

    def kernel(z, h, k, shift, m, n, t):
        m, n, k, t = map(complex_of, (m, n, k, t))
        x = jnp.stack([rows_of(z), rows_of(h)])
        n = n[:, None, None, None]
        b = t * (m[:, None, None] @ x)
        s = b @ n
        c = jnp.stack([k.conj() * s[1], k * s[0]])
        a = t.conj() * (c @ n.conj().mT)
        sums = (a @ x.conj().mT).sum((1, 2)).swapaxes(0, 1), (b.conj().mT @ c).sum((1, 2)).swapaxes(0, 1)
        parts = *sums, (s[0].conj() * s[1]).sum(0)
        parts = (jnp.stack([part.real, part.imag], -3)[None] for part in parts)
        return *(planes_of(x).astype(shapes.dtype) for x in m[:, None, None].conj().mT @ a), *parts

    return kernel


def outer_product(shapes):
    """`learned_outer_sm90.product` in float32, of one stream."""

    def taken_together(rows, count):
        rows = rows.reshape(-1, BLOCK).astype(jnp.float32)
        return jnp.pad(rows, ((0, -len(rows) % count), (0, 0))).reshape(-1, count, BLOCK)

    def kernel(z, x, *matrix):
        size = x.shape
        z, x = taken_together(z, shapes.rows), taken_together(x, shapes.columns)
        sums = jnp.einsum("sin,sjn->ij", z, x)[None]
        joined = [
            jnp.einsum("ij,sjn->sin", of_all[: shapes.columns, : shapes.rows].astype(jnp.float32), z)
            for of_all in matrix
        ]
        return sums, *(y.reshape(-1, N1, N1)[: size[0]].astype(shapes.dtype) for y in joined)

    return kernel


def stage(shapes, x, gate, matrix):
    """`three_pass._stage` in float32."""
    out, into = matrix.shape
    y = jnp.einsum("ij,bcdjn->bcdin", matrix, x[..., :into, :].astype(jnp.float32))
    return jnp.pad(y, [(0, 0)] * 3 + [(0, shapes.rows_out - out), (0, 0)]).astype(shapes.dtype)


@pytest.fixture
def algebra(monkeypatch):
    """What the kernels compute, written out, in their place, on any device."""
    monkeypatch.setattr(learned_long_api, "on_gpu", lambda operation, grid, *x: operation.fun(*x, None, grid))
    monkeypatch.setattr(learned_three_pass, "_stage", stage)
    monkeypatch.setattr(learned_three_pass, "lowered_once", lambda make, *shapes: make(*shapes))
    monkeypatch.setattr(learned_three_pass.learned_rows_forward_sm90, "forward", rows_forward)
    monkeypatch.setattr(learned_three_pass.learned_rows_transform_sm90, "transform", rows_transform)
    monkeypatch.setattr(learned_three_pass.learned_rows_backward_sm90, "backward", rows_backward)
    monkeypatch.setattr(learned_three_pass.learned_outer_sm90, "product", outer_product)


CASE = 3, 8000, 12000, 4, 3, "float16", True


def test_what_stands_around_the_kernels(algebra):
    """Three rows; twelve sequences, split by fours, that have two of them, and three of taps, that have all."""
    arguments, g, butterfly, want = problem(*CASE)
    check(run(g, arguments, butterfly), want, "float16")  # 1.0e-3


PLANTED = {
    "_adjoint": lambda planes: planes.mT,  # unconjugated
    "_roots": lambda turns, right=learned_three_pass._roots: right(-turns),
    "_of_block": lambda *x, right=learned_three_pass._of_block: right(*x)[::-1],
    "_any": lambda x: jnp.full(x.shape[0], True),  # features without taps or without a cotangent weigh, too
    "_one": lambda plan, right=learned_three_pass._one: 2 * right(plan),
    "_joining": lambda outer, rows, right=learned_three_pass._joining: right(
        outer * jnp.array([1, -1])[:, None, None], rows
    ),
    "_three": lambda planes: jnp.concatenate([planes[:, :1], -planes[:, 1:], planes[:, 1:]], 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_an_error_in_any_step_shows(name, algebra, monkeypatch):
    arguments, g, butterfly, want = problem(*CASE)
    monkeypatch.setattr(learned_three_pass, name, PLANTED[name])
    got = run(g, arguments, butterfly)
    assert max(map(relative_error, *map(jax.tree.leaves, (got, want)))) > 1.5 * LEARNED_LONG["float16"]


butterfly = LearnedButterfly("right_angle", (8, N1, N1), learn_inverse=True)
LENGTH = 8 * BLOCK
# Of the taps too, in float16. Cotangents of u and of the taps are joined where those of the outer blocks are summed up.
FORWARD = ["fft_conv_outer_stage"] * 3 + ["learned_rows_forward", "learned_rows_transform"]
GRADIENT = [
    *["fft_conv_outer_stage"] * 3,
    *["learned_outer_product"] * 3,
    *["learned_rows_backward"] * 2,
    "learned_rows_forward",
    "learned_rows_transform",
]


def arguments(batch=(2,), features=2):
    blocks = butterfly.init(jax.random.key(0), features, LENGTH)
    u = jax.ShapeDtypeStruct((*batch, features, LENGTH), jnp.bfloat16)
    return u, jax.ShapeDtypeStruct((features, LENGTH), jnp.float32), blocks


def named(u, kernel, blocks):
    return learned_long_conv(u, kernel, blocks=blocks, butterfly=butterfly, implementation="mosaic_gpu")


def gradient(u, kernel, blocks):
    return jax.grad(lambda *x: named(*x).astype(jnp.float32).sum(), (0, 1, 2))(u, kernel, blocks)


@pytest.mark.parametrize(
    ("function", "found"), [(named, FORWARD), pytest.param(gradient, GRADIENT, marks=pytest.mark.slow)]
)
def test_lowers_to_three_passes(function, found):
    assert kernels(lowered(function, *arguments())) == found


@pytest.mark.slow
def test_vmap_is_each_kernel_in_a_loop():
    u, _, blocks = arguments()
    mapped = jax.vmap(lambda u: named(u, jnp.ones((u.shape[-2], LENGTH)), blocks))
    text = lowered(mapped, jax.ShapeDtypeStruct((5, *u.shape), u.dtype))
    assert kernels(text) == FORWARD
    assert "stablehlo.while" in text


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request):
    mesh = jax.make_mesh((4, 2), ("batch", "feature"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def sharded(mesh):
    u, kernel, blocks = arguments((8,), 4)
    u_sharding, kernel_sharding = NamedSharding(mesh, P("batch", "feature")), NamedSharding(mesh, P("feature"))
    return u.update(sharding=u_sharding), kernel.update(sharding=kernel_sharding), blocks


@pytest.mark.parametrize("function", [named, pytest.param(gradient, marks=pytest.mark.slow)])
def test_under_a_sharded_jit_the_partitioner_asks_the_kernels(mesh, function):
    text = lowered(function, *sharded(mesh))
    assert "CustomSPMDPartitioning" in text
    assert not kernels(text)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [AxisType.Auto], indirect=True)
@pytest.mark.parametrize("checked", [True, False])
def test_shard_map_runs_the_kernels_on_each_shard(mesh, checked):
    u, kernel, blocks = sharded(mesh)
    specs = P("batch", "feature"), P("feature"), P()
    mapped = jax.shard_map(named, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=checked)
    text = lowered(mapped, u, kernel, blocks)
    assert kernels(text) == FORWARD
    assert re.search(r"@mosaic_gpu.*-> tensor<2x1x2x16x64x64xbf16>", text)  # of (8, 4, 32768)
    total = jax.grad(lambda *x: mapped(*x).astype(jnp.float32).sum(), (0, 1, 2))
    assert kernels(lowered(total, u, kernel, blocks)) == GRADIENT


@pytest.mark.parametrize("m", [1, 129])
def test_refuses_other_numbers_of_rows(m):
    blocks = [jax.ShapeDtypeStruct((n, n), jnp.complex64) for n in (m, N1, N1, N1, N1, m, m, N1, N1)]
    u, taps = jax.ShapeDtypeStruct((1, 1, BLOCK), jnp.bfloat16), jax.ShapeDtypeStruct((1, 9), jnp.float32)
    with pytest.raises(NotImplementedError, match=f"from 2 to 128 rows of 4096 steps; got {m}"):
        jax.eval_shape(learned_long_api.learned_long_fft_conv, u, taps, learned_long_api.LongBlocks(*blocks))
    other = LearnedButterfly("right_angle", (m, N1, N1))
    u, kernel, blocks = jnp.ones((1, 1, 9), u.dtype), jnp.ones((1, 9)), other.init(jax.random.key(0), 1, 9)
    with pytest.raises(NotImplementedError, match=rf"m, 64 and 64 with m from 2 to 128; got Plan\(factors=\({m}, 64"):
        learned_long_conv(u, kernel, blocks=blocks, butterfly=other, implementation="mosaic_gpu")


def test_refuses_more_sequences_than_it_addresses():
    """Even short ones: each has all rows of the transform."""
    blocks = learned_long_api.LongBlocks(*(jnp.ones((n, n), jnp.complex64) for n in (8, 64, 64, 64, 64, 8, 8, 64, 64)))
    taps = jax.ShapeDtypeStruct((2**15 // 5, 9), jnp.float32)

    def shape(batch):
        u = jax.ShapeDtypeStruct((batch, *taps.shape), jnp.bfloat16)
        return jax.eval_shape(learned_long_api.learned_long_fft_conv, u, taps, blocks).shape

    assert shape(5) == (5, *taps.shape)
    with pytest.raises(NotImplementedError, match="of 32768 points take fewer than 32768 sequences at once"):
        shape(6)
