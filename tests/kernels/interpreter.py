"""Pallas' interpreter of GPU kernels, with what JAX 0.11 lacks.

That is left factors in registers, accumulators that start from a value, copies that add and copies of a reshaped view.

What it cannot see: that products are asynchronous, and whether a matrix was committed before one reads it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic.interpret.utils import Access
from jax._src.pallas.mosaic_gpu.core import WGMMAAbstractAccumulatorRef
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax._src.state.types import AbstractRef, ReshapeTransform

TESTED_VERSIONS = ((0, 11),)  # of JAX: what is replaced here is private to it

_Interpreter = jaxpr_interpret.JaxprInterpreter
_product_from_shared_memory = _Interpreter._interpret_wgmma_ref_p
_set_memory = _Interpreter._interpret_swap_p
_copy = gpu_callbacks.copy_smem_to_gmem
_Memory = shared_memory.GPUSharedMemory
_access, _content = _Memory.access, _Memory.get_buffer_content


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs GPU kernels on the CPU and fails if they race; functions must be traced inside."""
    assert jax.__version_info__[:2] in TESTED_VERSIONS, f"tests.kernels.interpreter does not know JAX {jax.__version__}"
    with (
        mock.patch.object(_Interpreter, "_interpret_wgmma_ref_p", _product),
        mock.patch.object(gpu_callbacks, "copy_smem_to_gmem", _copy_or_add),
        mock.patch.object(WGMMAAbstractAccumulatorRef, "_setitem", AbstractRef._setitem),
        mock.patch.object(_Interpreter, "_interpret_swap_p", _set),
        mock.patch.object(_Memory, "access", _access_or_view),
        mock.patch.object(_Memory, "get_buffer_content", _content_or_view),
        mock.patch.object(callback, "io_callback_impl", _call_with_numpy),
        mock.patch.object(shared_memory, "_to_int", _to_int),
        _without_optimisation(),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
    ):
        yield
        jax.effects_barrier()
    assert not get_races().races_found


@contextlib.contextmanager
def _without_optimisation() -> Iterator[None]:
    """Most of the time goes into XLA's compiling a kernel's elementwise work for the CPU: 2.9 s like this, else 4.3."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _call_with_numpy(*arguments, callback, **_):
    """Calls with arrays of NumPy, in which the interpreter works.

    To make them JAX's first took most of its time: two tests of test_fft_conv_values 49 s of a core instead of 32.
    """
    return jax.tree.map(np.asarray, callback(*map(np.array, arguments)))  # copies, for the originals may go


def _to_int(x, from_jax=shared_memory._to_int):
    """A coordinate, which may then be NumPy's."""
    return x.item() if isinstance(x, np.ndarray) else from_jax(x)


def _product(interpreter, eqn, token, get_operands):
    """acc += a b, where a may be a value instead of a reference."""
    if isinstance(eqn.invars[1].aval, AbstractRef):
        return _product_from_shared_memory(interpreter, eqn, token, get_operands)
    acc, a, b, *indices = get_operands()
    of_acc, of_b = (eqn.params[f"{name}_transforms_tree"] or jax.tree.structure(()) for name in ("acc", "b"))
    acc_indices, b_indices = indices[: of_acc.num_leaves], indices[len(indices) - of_b.num_leaves :]
    acc, acc_at = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, acc, of_acc.unflatten(acc_indices))
    b, b_at = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, of_b.unflatten(b_indices))
    run = functools.partial(_accumulate, source_info=eqn.source_info)
    token = callback.io_callback(
        run,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
        acc=acc,
        acc_at=acc_at,
        a=a,
        b=b,
        b_at=b_at,
    )
    return token, []


def _set(interpreter, eqn, token, get_operands):
    """acc = value: an accumulator is its thread's own, and no race of its."""
    if not isinstance(eqn.invars[0].aval, WGMMAAbstractAccumulatorRef):
        return _set_memory(interpreter, eqn, token, get_operands)
    acc, value, *_ = get_operands()
    token = callback.io_callback(
        functools.partial(_store, source_info=eqn.source_info),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
        acc=acc,
        value=value,
    )
    return token, [value]


@gpu_callbacks.fail_on_exception
def _store(*, token, mesh_location, thread, acc, value, source_info):
    memory = gpu_callbacks._get_shared_memory()
    key = gpu_callbacks.HostAllocationKey.from_array(acc)
    info = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
    memory.store_buffer_content(key, memory.access(key, ()), np.asarray(value), thread, logging_info=info)
    return token


@gpu_callbacks.fail_on_exception
def _accumulate(*, token, mesh_location, thread, acc, acc_at, a, b, b_at, source_info):
    memory = gpu_callbacks._get_shared_memory()
    info = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)

    def place(key, at):
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        return key, memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(at)))

    def read(key, at):
        return memory.get_buffer_content(*place(key, at), thread, logging_info=info)[0]

    total = read(acc, acc_at)
    total = total + np.matmul(np.asarray(a), read(b, b_at), dtype=total.dtype)
    memory.store_buffer_content(*place(acc, acc_at), total, thread, logging_info=info)
    return token


@dataclasses.dataclass(frozen=True)
class _View(Access):
    """What is touched, read in another shape."""

    shape: tuple[int, ...] = ()


def _access_or_view(memory, key, transforms):
    *before, last = transforms or (None,)
    if not isinstance(last, ReshapeTransform):
        return _access(memory, key, transforms)
    touched = _access(memory, key, before)
    return _View(touched.range, touched.permutation, last.shape)


def _content_or_view(memory, key, access, *arguments, **options):
    content, *more = _content(memory, key, access, *arguments, **options)
    return content.reshape(access.shape) if isinstance(access, _View) else content, *more


class _Add(gpu_callbacks.AsyncCopySmemToGmemTask):
    """The asynchronous copy, which the interpreter runs at once, and then what was there before."""

    def pre_read(self, tma_thread_id, shared_memory):
        super().pre_read(tma_thread_id, shared_memory)
        self.before = self._destination(shared_memory)

    def post_write(self, tma_thread_id, shared_memory):
        total = self.before + self._destination(shared_memory)
        shared_memory.store_buffer_content(self.dst_allocation_key, self.dst_access, total, self.thread)
        super().post_write(tma_thread_id, shared_memory)

    def _destination(self, shared_memory):
        content, *_ = shared_memory.get_buffer_content(self.dst_allocation_key, self.dst_access, self.thread)
        return np.array(content)


@gpu_callbacks.fail_on_exception
def _copy_or_add(*, reduction_op, **arguments):
    if reduction_op is None:
        return _copy(reduction_op=None, **arguments)
    assert reduction_op == "add"
    memory, thread = gpu_callbacks._get_shared_memory(), arguments["thread"]
    places: dict[str, Any] = {}
    for name in ("src", "dst"):
        key = gpu_callbacks.HostAllocationKey.from_array(arguments[f"{name}_allocation_key_as_array"])
        at = gpu_callbacks._remove_noop_transforms(arguments[f"{name}_transforms"])
        places |= {f"{name}_allocation_key": key, f"{name}_access": memory.access(key, jax.tree.map(int, at))}
    clock = memory.incr_clock(thread)
    mesh_location, source_info = arguments["mesh_location"], arguments["source_info"]
    memory.execute_async_task(
        _Add(mesh_location=mesh_location, thread=thread, source_info=source_info, clock=clock, **places)
    )
    return arguments["token"]
