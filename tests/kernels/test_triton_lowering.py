"""Calls of the Triton kernels lower for CUDA through jax-triton itself, on a machine without a GPU.

Needs the triton and the cuda-aot extras: jax-triton cannot be imported without the CUDA plugin.
"""

import functools
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashbutterfly_jax import long_conv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux"),
    pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs the cuda-aot extra"),
]
triton = functools.partial(long_conv, implementation="triton")


class _Gpu:
    compute_capability = "8.6"


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A card for which it is compiled."""
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [_Gpu()])


def calls(function, *arguments) -> list[str]:
    """The custom calls of the lowered program."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @(\w+)", text)


def arrays(batch=(4,), features: int = 3, length: int = 1000):
    return jax.ShapeDtypeStruct((*batch, features, length), "bfloat16"), jax.ShapeDtypeStruct((features, length), "f4")


def total(u, kernel, **gates):
    return triton(u, kernel, **gates).astype(jnp.float32).sum()


def test_a_convolution_is_one_launch_and_its_gradient_two_or_with_a_post_gate_three():
    u, kernel = arrays()
    assert calls(triton, u, kernel) == ["triton_kernel_call"]
    assert calls(jax.grad(total, (0, 1)), u, kernel) == ["triton_kernel_call"] * 2

    def gated(u, kernel, pre_gate, post_gate):
        return total(u, kernel, pre_gate=pre_gate, post_gate=post_gate)

    assert calls(jax.grad(gated, (0, 1, 2, 3)), u, kernel, u, u) == ["triton_kernel_call"] * 3


@pytest.mark.parametrize(("length", "launches"), [(2048, 1), (2049, 2), (8192, 2)])
def test_on_hopper_the_gradient_is_one_launch_as_long_as_registers_suffice(length, launches, monkeypatch):
    monkeypatch.setattr(_Gpu, "compute_capability", "9.0")
    jax.clear_caches()
    u, kernel = arrays(length=length)
    assert calls(triton, u, kernel) == ["triton_kernel_call"]
    assert calls(jax.grad(total, (0, 1)), u, kernel) == ["triton_kernel_call"] * launches
    jax.clear_caches()


def test_vmap_is_one_launch():
    u, kernel = arrays(batch=(5, 4))
    assert calls(jax.vmap(triton, in_axes=(0, None)), u, kernel) == ["triton_kernel_call"]


@pytest.mark.parametrize("function", [triton, jax.grad(total, (0, 1))], ids=["forward", "gradient"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_under_a_sharded_jit_the_partitioner_asks_the_kernels(kind, function):
    mesh = jax.make_mesh((4, 2), ("batch", "feature"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        u, kernel = arrays(batch=(8,), features=4)
        u = u.update(sharding=NamedSharding(mesh, P("batch", "feature")))
        kernel = kernel.update(sharding=NamedSharding(mesh, P("feature")))
        assert calls(function, u, kernel) == ["CustomSPMDPartitioning"]


@pytest.mark.parametrize("checked", [True, False])
def test_shard_map_runs_the_kernels_on_each_shard(checked):
    mesh = jax.make_mesh((4, 2), ("batch", "feature"), axis_types=(AxisType.Auto,) * 2)
    specs = P("batch", "feature"), P("feature")
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(triton, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=checked)
        gradient = jax.grad(lambda u, kernel: mapped(u, kernel).astype(jnp.float32).sum(), (0, 1))
        for function in (mapped, gradient):
            assert set(calls(function, *arrays(batch=(8,), features=4))) == {"triton_kernel_call"}
