"""Runs the Triton kernels on the CPU, in Triton's own interpreter, inside jitted JAX programs.

Interpreted is a copy of the kernels that is made while Triton's switch for that is on, so that the kernels of this
process stay as they are and compile. Four things are mended: the interpreter wants tensors of PyTorch; its products of
bfloat16 multiply bit patterns; it cuts float32 off to bfloat16, which GPUs round to nearest; and bounds of its loops
are arrays of one number, which NumPy 2.5 takes for no number.
"""

import atexit
import contextlib
import functools
import importlib.util
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels.fft_conv import triton_launch

_COPIES = tempfile.TemporaryDirectory()


@functools.cache
def kernels(kernel_module: str, changes: tuple[tuple[str, str], ...] = ()):
    """The interpreted copy of a module, with pieces of its source replaced."""
    source = Path(importlib.util.find_spec(kernel_module).origin).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{source.count(old)} times in the kernels: {old}"
        source = source.replace(old, new)
    name = f"interpreted_triton_{kernels.cache_info().misses}"
    file = Path(_COPIES.name, f"{name}.py")  # the interpreter reads it again
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


atexit.register(_COPIES.cleanup)


class _Tensor:
    """What the interpreter asks of a tensor of PyTorch."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data


def _widened(x):
    """A handle's numbers, which for bfloat16 are its bit patterns, in float32."""
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data


_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_impl(self, src, dst_type):
    if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
        return interpreter.TensorHandle(src.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
    if dst_type.scalar == tl.float32 and src.dtype.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_widened(src), tl.float32)
    return _cast(self, src, dst_type)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = np.matmul(_widened(a), _widened(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


_patch_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_changes: tuple[tuple[str, str], ...] = ()
"""Those in force: looked up when a kernel runs, for JAX keeps what it has traced."""


_traced_card: str | None = None
"""The card for which the launches were traced that JAX may keep."""

_one_at_a_time = threading.Lock()
"""What is mended, and the place in the grid, are the whole process's: two devices would read each other's."""


def _run(kernel_module, name, results, programs, constants, first, *arrays):
    with _one_at_a_time:
        return _run_alone(kernel_module, name, results, programs, constants, first, *arrays)


def _run_alone(kernel_module, name, results, programs, constants, first, *arrays):
    arrays = [np.ascontiguousarray(array) for array in arrays]
    outputs = [np.zeros(result.shape, result.dtype) for result in results]
    kernel = getattr(kernels(kernel_module, _changes), name)
    names = list(kernel.arg_names)
    tensors = dict(zip(names, map(_Tensor, [*arrays, *outputs]), strict=False))
    executor = interpreter.GridExecutor(kernel.rewrite(), names, (programs,))
    builder = interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    with (
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs)),
        mock.patch.object(interpreter.GridExecutor, "_restore_args_dev"),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _create_dot),
        mock.patch.object(interpreter.InterpreterBuilder, "cast_impl", _cast_impl),
        mock.patch.object(interpreter, "_patch_lang_tensor", _patch_lang_tensor),
        mock.patch.object(builder, "set_grid_dim", lambda x, y, z: set_dim(x + first, y, z)),
        mock.patch.object(builder, "set_grid_idx", lambda x, y, z: set_index(x + first, y, z)),
        np.errstate(all="ignore"),  # of infinities on purpose
    ):
        executor(**tensors, **constants)
    return outputs


@contextlib.contextmanager
def interpreted(*changes: tuple[str, str], card: str = "8.6") -> Iterator[list[str]]:
    """While it lasts, launches are interpreted, with the plans of a card; yields the names of those that were made."""
    global _traced_card
    if card != _traced_card:  # JAX keeps what it has traced, and knows nothing of cards
        jax.clear_caches()
        _traced_card = card
    launches: list[str] = []

    def launch(kernel_module, name, operands, results, programs, constants):
        launches.append(name)
        run = functools.partial(_run, kernel_module, name, results, programs, constants, 0)
        return list(jax.pure_callback(run, list(results), *operands))

    with (
        mock.patch.object(triton_launch, "interpreter", launch),
        mock.patch.object(triton_launch, "interpreted_card", card),
        mock.patch.object(sys.modules[__name__], "_changes", tuple(changes)),
    ):
        yield launches


def run_program(kernel_module: str, name: str, arrays, results, program: int, constants) -> list[np.ndarray]:
    """Runs one program of a grid."""
    return _run(kernel_module, name, results, 1, constants, program, *arrays)
