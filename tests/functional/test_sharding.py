"""A sharded long convolution: right values, and no communication but the batch sum of a kernel gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashbutterfly_jax import long_conv
from flashbutterfly_jax.functional.reference import long_conv_reference
from tests.parity import Case, cast

SPECS = (P("data"), P(None, "feature"), P("data", "feature"), P(("data", "feature")))
NAMES = ("u", "kernel", "skip", "reverse_kernel", "pre_gate", "post_gate")


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request):
    mesh = jax.make_mesh((4, 2), ("data", "feature"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def request(length=20) -> list[jax.Array]:
    case = Case(length, 20, True, channels=3, skip=True, pre_gate=True, post_gate="shared", batch=(16,), features=4)
    arrays = cast(case.arguments(), "float32")
    return [arrays[name] for name in NAMES]


def place(mesh, spec, arrays) -> list[jax.Array]:
    """Sequences as the spec says, kernels by its feature axis."""
    kernel_spec = P(None, *spec[1:2])
    specs = (spec, kernel_spec, kernel_spec, kernel_spec, spec, spec)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def convolve(u, kernel, skip, reverse_kernel, pre_gate, post_gate, *, circular=False):
    gates = {"pre_gate": pre_gate, "post_gate": post_gate}
    return long_conv(u, kernel, skip, reverse_kernel=reverse_kernel, circular=circular, **gates)


def circular(*arrays):
    return convolve(*arrays, circular=True)


def gradient(*arrays):
    return jax.grad(lambda *arrays: jnp.sum(convolve(*arrays) ** 2), argnums=tuple(range(len(arrays))))(*arrays)


def communication(compiled) -> set[str]:
    operations = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    return set(re.findall(rf" ({operations})(?:-start)?\(", compiled.as_text()))


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_the_search_for_communication_finds_that_of_plain_ffts():
    """XLA's own FFT gathers the batch on jax 0.11: what this file guards against, and proof that it would see it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    u = jax.device_put(jnp.ones((16, 4, 20)), NamedSharding(mesh, P("data")))

    def by_the_reference(u):
        return long_conv_reference(u, jnp.ones((1, 4, 20)), None)

    if jax.__version_info__ < (0, 12):
        assert "all-gather" in communication(jax.jit(by_the_reference).lower(u).compile())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("function", [convolve, circular])
def test_forward_does_not_communicate(mesh, spec, function):
    arrays = request()
    placed = place(mesh, spec, arrays)
    compiled = jax.jit(function).lower(*placed).compile()
    assert communication(compiled) == set()
    y = compiled(*placed)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec[:1], None, *spec[1:])), y.ndim)
    assert_close(y, function(*arrays))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradient_communicates_only_the_sum_over_the_batch(mesh, spec):
    arrays = request()
    placed = place(mesh, spec, arrays)
    compiled = jax.jit(gradient).lower(*placed).compile()
    batch_is_sharded = spec[0] is not None
    text = compiled.as_text()
    assert communication(compiled) <= ({"all-reduce"} if batch_is_sharded else set()), text
    got = compiled(*placed)
    # The kernel's spectrum has C D (N / 2 + 1) complex numbers; the sequences have 16 times as many.
    reduced = [np.prod([int(n) for n in re.findall(r"\d+", shape)]) for shape in _all_reduced(text)]
    assert bool(reduced) is batch_is_sharded
    assert sum(reduced) <= 2 * 3 * 4 * 21 + 3 * 4, reduced
    for g, x in zip(got, placed, strict=True):
        assert g.sharding.is_equivalent_to(x.sharding, g.ndim)
    assert_close(got, gradient(*arrays))


def _all_reduced(text: str) -> list[str]:
    """The shape of each array that an all-reduce of the compiled program sums."""
    lines = [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    return [shape for line in lines for shape in re.findall(r"[fc]\d+(\[[\d,]*\])\{", line.split("all-reduce(")[0])]


def test_without_a_mesh_in_context():
    mesh = jax.make_mesh((4, 2), ("data", "feature"), axis_types=(AxisType.Auto,) * 2)
    placed = place(mesh, P("data", "feature"), request())
    compiled = jax.jit(convolve).lower(*placed).compile()
    assert communication(compiled) == set()
    assert_close(compiled(*placed), convolve(*request()))


def test_without_jit():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    u, kernel, *_ = request()
    y = long_conv(jax.device_put(u, NamedSharding(mesh, P("data"))), kernel)
    assert y.sharding.spec[0] == "data"
    assert_close(y, long_conv(u, kernel))


@pytest.mark.parametrize("axis_names", [{"data", "feature"}, {"data"}], ids=["all axes", "one axis of the mesh"])
def test_shard_map(mesh, axis_names):
    arrays = request()
    feature = "feature" if "feature" in axis_names else None
    sequence, kernel = P("data", feature), P(None, feature)
    specs = (sequence, kernel, kernel, kernel, sequence, sequence)
    mapped = jax.shard_map(convolve, in_specs=specs, out_specs=P("data", None, feature), axis_names=axis_names)
    placed = place(mesh, P("data", "feature"), arrays)
    compiled = jax.jit(mapped).lower(*placed).compile()
    assert communication(compiled) == set()
    assert_close(compiled(*placed), convolve(*arrays))

    def mapped_gradient(*arrays):
        return jax.grad(lambda *arrays: jnp.sum(mapped(*arrays) ** 2), argnums=tuple(range(len(arrays))))(*arrays)

    compiled = jax.jit(mapped_gradient).lower(*placed).compile()
    assert communication(compiled) <= {"all-reduce"}
    assert_close(compiled(*placed), gradient(*arrays))


def test_vmap_over_a_sharded_axis(mesh):
    arrays = request()
    placed = place(mesh, P("data", "feature"), arrays)
    mapped = jax.vmap(convolve, in_axes=(0, None, None, None, 0, 0), spmd_axis_name="data")
    compiled = jax.jit(mapped).lower(*placed).compile()
    assert communication(compiled) == set()
    assert_close(compiled(*placed), convolve(*arrays))


def test_programs_of_one_shape_in_different_meshes_do_not_mix():
    u, kernel, *_ = request()
    want = long_conv(u, kernel)
    for kind in (AxisType.Explicit, AxisType.Auto, AxisType.Explicit):
        with jax.set_mesh(jax.make_mesh((4, 2), ("data", "feature"), axis_types=(kind,) * 2)):
            mapped = jax.shard_map(
                lambda u: long_conv(u, kernel), in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
            )
            assert_close(jax.jit(mapped)(jax.device_put(u, P("data"))), want)


@pytest.mark.parametrize("function", [convolve, circular])
def test_a_sharded_length_is_gathered_where_sharding_is_automatic(function):
    mesh = jax.make_mesh((4, 2), ("data", "length"), axis_types=(AxisType.Auto,) * 2)
    arrays = request()
    u = jax.device_put(arrays[0], NamedSharding(mesh, P("data", None, "length")))
    compiled = jax.jit(function).lower(u, *arrays[1:]).compile()
    assert_close(compiled(u, *arrays[1:]), function(*arrays))
    whole_batch = re.findall(r"(?:f32|c64)\[16,4,\d+\]", compiled.as_text().split("ENTRY")[0])
    assert not whole_batch, "gathers the batch too"


def test_a_sharded_length_is_refused_where_sharding_is_explicit():
    mesh = jax.make_mesh((8,), ("length",), axis_types=(AxisType.Explicit,))
    u, kernel = jnp.ones((4, 16)), jnp.ones((4, 16))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(u, P(None, "length"))
        with pytest.raises(ValueError, match=r"u must not be sharded along its last axis.*got 'length'.*reshard"):
            long_conv(sharded, kernel)
        with pytest.raises(ValueError, match="kernel must not be sharded along its last axis"):
            long_conv(u, jax.device_put(kernel, P(None, "length")))
