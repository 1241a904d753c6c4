"""A long convolution whose length is spread over devices: right values and gradients, and what travels for them."""

import functools
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashbutterfly_jax import long_conv, long_conv_on_mesh, sequence_parallel_long_conv
from tests.parity import Case, cast, direct_gradients, direct_sum, relative_error

# Of values and gradients alike, beside the largest error over all cases here: dtype -> tolerance
TOLERANCES = {
    "float64": 5e-15,  # 7.1e-16
    "float32": 1e-6,  # 2.0e-7
    "bfloat16": 4e-3,  # 3.3e-3; half a unit in the last place is 3.9e-3 of the smallest number of a binade
}

BY_FEATURES = {"split": "features", "features": 8}
BY_FREQUENCIES = {"split": "frequencies", "features": 3}
SPLITS = pytest.mark.parametrize("by", [BY_FEATURES, BY_FREQUENCIES], ids=lambda by: by["split"])
CIRCULAR = pytest.mark.parametrize("circular", [False, True], ids=["causal", "circular"])
LENGTHS = {1: 15, 2: 20, 3: 27, 4: 48, 8: 64}


def line_of(devices: int, kind=AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("sequence",), axis_types=(kind,), devices=jax.devices()[:devices])


def check(case: Case, dtype: str, **options) -> None:
    """Values and every gradient against the direct sum, whose error is that of float64."""
    with jax.enable_x64(dtype == "float64"):
        arrays = cast(case.arguments(), dtype)
        exact = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
        want = direct_sum(**exact, circular=case.circular)
        cotangent = np.random.default_rng(1).standard_normal(want.shape).astype(np.float16)
        cotangent = jnp.asarray(cotangent, dtype)

        @jax.jit
        def values_and_gradients(arrays, cotangent):
            convolve = functools.partial(long_conv_on_mesh, axis_name="sequence", circular=case.circular, **options)
            y, pull_back = jax.vjp(lambda arrays: convolve(**arrays), arrays)
            return y, pull_back(cotangent)[0]

        y, gradients = values_and_gradients(arrays, cotangent)
        assert y.dtype == dtype
        errors = {"y": relative_error(y, want) / TOLERANCES[dtype]}
        wanted = direct_gradients(np.asarray(cotangent, np.float64), **exact, circular=case.circular)
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == arrays[name].dtype, name
            errors[name] = relative_error(gradient, wanted[name]) / TOLERANCES[str(gradient.dtype)]
        assert max(errors.values()) < 1, errors


@pytest.mark.parametrize("devices", LENGTHS)
@SPLITS
@CIRCULAR
def test_values_and_gradients(devices, by, circular):
    post_gate = "own" if circular else "shared"
    features = 2 * devices if by["split"] == "features" else 3
    options = {"channels": 2, "skip": True, "pre_gate": True, "post_gate": post_gate, "features": features}
    case = Case(LENGTHS[devices], LENGTHS[devices] - 3 - devices % 2, devices > 2, circular=circular, **options)
    check(case, "float64", mesh=line_of(devices), split=by["split"])


@pytest.mark.parametrize(
    ("taps", "batch", "options"),
    [
        (1, (), {}),
        (32, (3,), {"skip": True}),
        (33, (1, 2), {"channels": 1, "post_gate": "shared"}),
        (1, (2,), {"circular": True}),
        (71, (), {"circular": True, "channels": 3, "pre_gate": True}),
        (32, (), {"bidirectional": True, "channels": 2}),
        (40, (1,), {"bidirectional": True, "skip": True}),
        (45, (), {"bidirectional": True, "circular": True}),
    ],
)
@SPLITS
def test_numbers_of_taps_and_of_batch_axes(taps, batch, options, by):
    case = Case(32, taps, batch=batch, features=by["features"], **options)
    check(case, "float64", mesh=line_of(4), split=by["split"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@SPLITS
def test_narrow_dtypes_compute_in_float32(dtype, by):
    case = Case(48, 48, channels=2, skip=True, pre_gate=dtype == "float32", features=by["features"])
    check(case, dtype, mesh=line_of(4), split=by["split"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@SPLITS
def test_batch_and_sequence_at_once(kind, by):
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(kind,) * 2)
    options = {"channels": 2, "skip": True, "pre_gate": True, "post_gate": "shared", "features": by["features"]}
    check(Case(32, 31, batch=(4,), **options), "float64", mesh=mesh, batch_axis_name="data", split=by["split"])


@pytest.mark.parametrize("taps", [12, 36])
def test_placed_taps_of_another_number_than_the_devices_can_share(taps):
    mesh = line_of(4, AxisType.Explicit)
    arrays = cast(Case(32, taps, circular=True).arguments(), "float32")
    kernel = jax.device_put(arrays["kernel"], NamedSharding(mesh, P(None, "sequence")))
    y = long_conv_on_mesh(arrays["u"], kernel, mesh=mesh, axis_name="sequence", circular=True)
    want = direct_sum(**Case(32, taps, circular=True).arguments(), circular=True)
    assert relative_error(y, want) < TOLERANCES["float32"]


def local_convolution(devices, options, **specs):
    by_step = P(None, None, "sequence")
    return jax.shard_map(
        functools.partial(sequence_parallel_long_conv, axis_name="sequence", **options),
        mesh=line_of(devices),
        in_specs=(specs.get("u", by_step), specs.get("kernel", by_step), P()),
        out_specs=P(None, None, None, "sequence"),
    )


@SPLITS
def test_gradients_are_sharded_like_their_arguments(by):
    """Also the agreement with `long_conv` from within `shard_map`."""
    mesh, features = line_of(4), by["features"]
    case = Case(32, 32, channels=2, skip=True, features=features)
    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(x) for x in case.arguments().values())
        specs = (P(None, None, "sequence"), P(None, None, "sequence"), P())
        placed = tuple(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True))

        def gradient(function, arrays):
            return jax.jit(jax.grad(lambda arrays: jnp.sum(jnp.sin(function(*arrays)))))(arrays)

        got = gradient(local_convolution(4, {"split": by["split"]}), placed)
        for g, x, want in zip(got, placed, gradient(long_conv, arrays), strict=True):
            assert g.sharding.is_equivalent_to(x.sharding, g.ndim)
            assert relative_error(g, np.asarray(want)) < 5e-15


@SPLITS
def test_without_checks_of_what_varies(by):
    arrays = cast(Case(32, 32, features=by["features"]).arguments(), "float32")
    mapped = jax.shard_map(
        functools.partial(sequence_parallel_long_conv, axis_name="sequence", split=by["split"]),
        mesh=line_of(4),
        in_specs=(P(None, None, "sequence"), P(None, "sequence")),
        out_specs=P(None, None, "sequence"),
        check_vma=False,
    )

    def gradient(function):
        loss = jax.value_and_grad(lambda u, kernel: jnp.sum(jnp.sin(function(u, kernel))), argnums=(0, 1))
        return jax.jit(loss)(arrays["u"], arrays["kernel"])

    for got, want in zip(jax.tree.leaves(gradient(mapped)), jax.tree.leaves(gradient(long_conv)), strict=True):
        assert relative_error(got, np.asarray(want)) < 5e-6  # of two computations in float32; measured 1.1e-6


@pytest.mark.parametrize("split", ["features", "frequencies"])
def test_the_past_alone_is_seen(split):
    """By the whole Jacobian of each feature: a triangle of the kernel's taps, in forward and in reverse mode."""
    with jax.enable_x64(True):
        kernel = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)))
        convolve = functools.partial(long_conv_on_mesh, mesh=line_of(4), axis_name="sequence", split=split)
        u = jnp.zeros((4, 16))
        steps = np.arange(16)
        lags = steps[:, None] - steps
        want = np.where(lags >= 0, np.asarray(kernel)[:, lags], 0.0)
        for jacobian in (jax.jacfwd, jax.jacrev):
            got = np.asarray(jax.jit(jacobian(lambda u: convolve(u, kernel)))(u))
            for feature in range(4):
                assert np.abs(got[feature, :, feature] - want[feature]).max() < 1e-14


def exchanges(text: str) -> list[tuple[str, int]]:
    """The dtype of each all-to-all of a compiled program, and how many of its numbers a device hands over."""
    found = []
    for operands in re.findall(r"= (.*) all-to-all(?:-start)?\(", text):
        shapes = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", operands)
        found.append((shapes[0][0], sum(math.prod(int(n) for n in shape.split(",") if n) for _, shape in shapes)))
    return found


@SPLITS
@CIRCULAR
def test_what_travels(by, circular):
    """Two sequences of 256 steps with three channels on 4 devices, n = 64: no gathers, and these exchanges alone."""
    batch, channels, features, devices, steps = 2, 3, by["features"], 4, 64
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((batch, features, 256), (channels, features, 256), (channels, features))
    ]
    convolve = local_convolution(devices, {"circular": circular, "split": by["split"]})
    u, kernel, y = (rows * features * steps for rows in (batch, channels, batch * channels))
    columns = -(-((steps if circular else 2 * steps) // 2 + 1) // devices) * devices
    assert 2 * columns <= (1 if circular else 2) * steps + 2 * devices, "as the docstring says"
    one_way = [("f32", u), ("f32", kernel), ("f32", y)]
    if by["split"] == "frequencies":
        one_way += [("c64", held // steps * columns) for held in (u, kernel, y)]

    text = jax.jit(convolve).lower(*arguments).compile().as_text()
    assert sorted(exchanges(text)) == sorted(one_way)
    others = r" (all-gather|all-reduce|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
    assert not re.findall(others, text)

    gradient = jax.grad(lambda *arrays: jnp.sum(convolve(*arrays) ** 2), argnums=(0, 1, 2))
    text = jax.jit(gradient).lower(*arguments).compile().as_text()
    assert sorted(exchanges(text)) == sorted(2 * one_way)
    assert set(re.findall(others, text)) <= {"all-reduce"}
    reduced = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    numbers = [math.prod(map(int, n.split(","))) for line in reduced for n in re.findall(r"\[([\d,]+)\]", line)]
    assert sum(numbers) == channels * features, "the gradient of the skip"


def test_the_kernel_gradient_is_summed_over_the_batch_as_a_spectrum():
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    convolve = functools.partial(long_conv_on_mesh, mesh=mesh, axis_name="sequence", batch_axis_name="data")
    gradient = jax.grad(lambda *arrays: jnp.sum(convolve(*arrays) ** 2), argnums=(0, 1))
    u, kernel = (jax.ShapeDtypeStruct((6, 3, 256), jnp.float32), jax.ShapeDtypeStruct((3, 256), jnp.float32))
    specs = P("data", None, "sequence"), P(None, "sequence")
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    text = jax.jit(gradient, in_shardings=shardings).lower(u, kernel).compile().as_text()
    (reduced,) = re.findall(r"= c64\[([\d,]+)\]\S* all-reduce(?:-start)?\(", text)
    assert math.prod(map(int, reduced.split(","))) == 3 * 68, "n + 1 columns, rounded up to a multiple of P"
    assert len(re.findall(r" (all-reduce|all-gather|collective-permute)(?:-start)?\(", text)) == 1


def test_short_kernels_have_short_spectra():
    """Of (n + k) / 2 + 1 columns, n = 64 and k = 16, rounded up to a multiple of 4."""
    shapes = ((1, 3, 256), (1, 3, 64), (1, 3))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(local_convolution(4, {})).lower(*arguments).compile().as_text()
    assert sorted(exchanges(text)) == [("c64", 3 * 44)] * 3 + [("f32", 3 * 16)] + [("f32", 3 * 64)] * 2


@SPLITS
def test_numbers_of_16_bits_travel_as_such(by):
    """Before compilation: a CPU has no bfloat16 of its own."""
    u = jax.ShapeDtypeStruct((2, by["features"], 64), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((2, by["features"], 64), jnp.float32)
    skip = jax.ShapeDtypeStruct((2, by["features"]), jnp.float32)
    text = jax.jit(local_convolution(4, {"split": by["split"]})).lower(u, kernel, skip).as_text()
    dtypes = re.findall(r'"stablehlo.all_to_all".*?tensor<[\dx]*x([a-z]\w*(?:<f32>)?)>', text)
    of_spectra = 3 if by["split"] == "frequencies" else 0
    assert sorted(dtypes) == sorted(["bf16", "bf16", "f32"] + ["complex<f32>"] * of_spectra)


def test_features_are_split_where_they_can_be():
    for features, count in ((8, 3), (6, 6)):
        u, kernel = (jax.ShapeDtypeStruct((2, features, 64), jnp.float32) for _ in range(2))
        skip = jax.ShapeDtypeStruct((2, features), jnp.float32)
        text = jax.jit(local_convolution(4, {})).lower(u, kernel, skip).as_text()
        assert len(re.findall(r'"stablehlo.all_to_all"', text)) == count


def test_a_length_that_only_p_divides_is_split_by_features():
    check(Case(20, 13, features=8), "float64", mesh=line_of(4))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_each_device_runs_the_implementation_named(bidirectional):
    """By features: in a program lowered for CUDA the fused kernel gets whole sequences, and 16 bits travel."""
    shapes = {"u": ((2, 8, 256), jnp.bfloat16), "kernel": ((8, 256), jnp.float32)}
    if bidirectional:
        shapes["reverse_kernel"] = shapes["kernel"]
    arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}

    def lowered(implementation):
        options = {"mesh": line_of(4), "axis_name": "sequence", "implementation": implementation}
        convolve = jax.jit(lambda arrays: long_conv_on_mesh(**arrays, **options))
        return convolve.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()

    text = lowered("mosaic_gpu")
    assert "mosaic_gpu" in text
    assert "fft" not in re.findall(r"stablehlo\.(\w+)", text)
    assert re.findall(r'"stablehlo.all_to_all".*?tensor<[\dx]*x(\w+)>', text).count("bf16") == 2
    assert "mosaic_gpu" not in lowered("xla")


@pytest.mark.parametrize("implementation", ["butterfly", ("triton", "xla"), None])
def test_implementations_agree(implementation):
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    case = Case(48, 40, True, channels=2, skip=True, features=4)
    check(case, "float64", mesh=mesh, batch_axis_name="data", split="features", implementation=implementation)


U, KERNEL = jnp.ones((2, 3, 16)), jnp.ones((3, 16))


def test_frequencies_are_xlas():
    mesh = line_of(4)
    for split in (None, "frequencies"):
        with pytest.raises(
            NotImplementedError, match=r"by 'xla' alone; got implementation 'butterfly'.* D = 3 .* P = 4"
        ):
            long_conv_on_mesh(U, KERNEL, mesh=mesh, axis_name="sequence", split=split, implementation="butterfly")
    y = long_conv_on_mesh(U, KERNEL, mesh=mesh, axis_name="sequence", implementation=("butterfly", "xla"))
    assert y.shape == U.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis_name": "length"}, r"axis_name must be an axis of the mesh, of \('data', 'sequence'\); got 'length'\."),
        ({"batch_axis_name": "b"}, r"batch_axis_name must be an axis of the mesh, of \('data', .*\); got 'b'\."),
        ({"batch_axis_name": "sequence"}, r"batch_axis_name must be another axis than axis_name; got 'sequence'"),
        (
            {"u": jnp.ones((3, 3, 16)), "batch_axis_name": "data"},
            r"a batch of B = 3 cannot be split over axis 'data', since P = 2, .* nearest that can: 2 and 4 are\.",
        ),
        (
            {"u": jnp.ones((3, 16)), "batch_axis_name": "data"},
            r"batch_axis_name must be None where u has no batch; got u of shape \(3, 16\)\.",
        ),
        (
            {"u": jnp.ones((2, 3, 20))},
            r"a length of L = 20 cannot be split over axis 'sequence', .* nearest that can: 16 and 32 are\.",
        ),
        ({"u": jnp.ones((3, 12))}, r"a length of L = 12 .* the nearest that can: 16 is\."),
        (
            {"u": jnp.ones((4, 10)), "kernel": jnp.ones((4, 3))},
            r"L = 10 .*, since P = 4, does not divide it; the nearest that can: 8 and 12 are\.",
        ),
        ({"split": "features"}, r"split must be 'frequencies' where P = 4 does not divide D = 3\."),
        ({"split": "batch"}, r"split must be None or of \('features', 'frequencies'\); got 'batch'\."),
        ({"circular": 1}, r"circular must be True or False; got 1\."),
        ({"u": jnp.ones(16)}, r"u must have shape \(\*B, D, L\) and no empty axis; got shape \(16,\)\."),
        ({"u": jnp.ones((3, 16), int)}, r"u must have a real floating-point dtype; got int32\."),
        ({"kernel": jnp.ones((2, 16))}, r"kernel must have shape .* D = 3 as in u .*; got shape \(2, 16\)\."),
        ({"skip": jnp.ones(2)}, r"skip must have shape \(3,\), that of .*; got shape \(2,\)\."),
        ({"reverse_kernel": KERNEL[1:]}, r"reverse_kernel must have shape \(3, 16\), .*; got shape \(2, 16\)\."),
        ({"pre_gate": KERNEL}, r"pre_gate must have shape \(2, 3, 16\), that of .*; got shape \(3, 16\)\."),
        ({"post_gate": KERNEL}, r"post_gate must have shape \(2, 3, 16\), that of .*; got shape \(3, 16\)\."),
    ],
)
def test_errors_on_a_mesh(changes, message):
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=message):
        long_conv_on_mesh(**{"u": U, "kernel": KERNEL, "mesh": mesh, "axis_name": "sequence"} | changes)


@pytest.mark.parametrize(
    ("u", "kernel", "options", "message"),
    [
        (U, KERNEL, {"axis_name": "s"}, r"must be a manual axis of the mesh, of \('sequence',\); got 's'\."),
        (U[..., :12], KERNEL[..., :4], {}, r"a length of L = 12 cannot be split .* P\^2 = 16, P = 4"),
        (U, KERNEL[:, :8], {}, r"a kernel of K = 8 cannot be split .* the nearest that can: 16 is\."),
        (U, jnp.ones((3, 32)), {}, r"kernel must have .* 1 <= k <= n, D = 3 and n = 4 .*; got shape \(3, 8\)\."),
        (U, KERNEL, {"split": "features"}, r"split must be 'frequencies' where P = 4 does not divide D = 3\."),
        (U, KERNEL, {"circular": None}, r"circular must be True or False; got None\."),
        (U[0, 0], KERNEL, {}, r"u must have shape \(\*B, D, n\) and no empty axis; got shape \(4,\)\."),
        (U, KERNEL, {"skip": jnp.ones(2)}, r"skip must have shape \(3,\), that of .*; got shape \(2,\)\."),
    ],
)
def test_errors_inside_shard_map(u, kernel, options, message):
    mapped = jax.shard_map(
        functools.partial(sequence_parallel_long_conv, **{"axis_name": "sequence"} | options),
        mesh=line_of(4),
        in_specs=(P(*[None] * (u.ndim - 1), "sequence"), P(None, "sequence")),
        out_specs=P(*[None] * (u.ndim - 1), "sequence"),
    )
    with pytest.raises(ValueError, match=message):
        mapped(u, kernel)


def test_error_outside_of_shard_map():
    with pytest.raises(ValueError, match=r"of which there are none: call this inside jax\.shard_map; got 'sequence'\."):
        sequence_parallel_long_conv(U, KERNEL, axis_name="sequence")


ONE_PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from flashbutterfly_jax import long_conv, long_conv_on_mesh

mesh = jax.make_mesh((4,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
random = np.random.default_rng(0)
for features in (3, 4):
    arrays = random.standard_normal((2, features, 64)), random.standard_normal((2, features, 64))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "sequence"))
    placed = [jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]) for x in arrays]

    def gradients(convolve, u, kernel):
        return jax.grad(lambda *a: jax.numpy.sum(jax.numpy.sin(convolve(*a))), argnums=(0, 1))(u, kernel)

    def spread(u, kernel):
        return gradients(lambda *a: long_conv_on_mesh(*a, mesh=mesh, axis_name="sequence"), u, kernel)

    for got, want in zip(jax.jit(spread)(*placed), gradients(long_conv, *arrays), strict=True):
        assert len(got.addressable_shards) == 2
        for shard in got.addressable_shards:
            assert shard.data.shape == (2, features, 16)
            error = np.abs(np.asarray(shard.data) - np.asarray(want)[shard.index]).max() / np.abs(want).max()
            assert error < 5e-15, error
print("devices", jax.device_count(), "processes", jax.process_count())
"""


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"localhost:{listener.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", ONE_PROCESS, coordinator, str(number)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all("devices 4 processes 2" in output for output in outputs)
