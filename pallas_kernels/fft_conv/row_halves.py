"""Halves of rows change places between two matrices in registers, at no cost.

In the registers' layout of the tensor cores' results a warp has 16 rows of a matrix of 64, and a thread has of two of
them, i and i + 8, the same columns. So it may take the first 8 of each 16 rows of two matrices for one matrix and the
last 8 for another. What a product leaves as real parts in rows 16 w + i and imaginary parts in rows 16 w + 8 + i,
i < 8, for each of two sequences, are then the real parts of both and their imaginary parts, in one thread.
"""

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

# There is no public way to lower a primitive of one's own in a kernel.
from jax._src.pallas.mosaic_gpu import lowering
from jax.extend.core import Primitive
from jax.interpreters import mlir

_LAYOUT = plgpu.Layout.WGMMA
_HALF_AXIS = 4
"""Of the array of registers: which 8 of 16 rows."""


def exchanged(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first 8 of each 16 rows of two matrices `(64, n)` of a kernel, in turns, and the last 8; its own inverse.

    Example:
      >>> first, second = (jnp.full((64, 8), number) for number in (1, 2))
      >>> [[int(x) for x in part[:24:8, 0]] for part in exchanged(first, second)]
      [[1, 2, 1], [1, 2, 1]]
    """
    upper, lower = (_halves.bind(first, second, half=half) for half in (0, 1))
    return upper, lower


def _by_rows(first, second, *, half: int):
    """What it means."""
    parts = [x.reshape(4, 2, 8, x.shape[1])[:, half] for x in (first, second)]
    return jnp.stack(parts, 1).reshape(first.shape)


def _by_registers(first, second, *, half: int):
    """What the GPU does."""

    @plgpu.inline_mgpu(
        arg_types=(_LAYOUT, _LAYOUT), return_type=plgpu.ShapeDtypeStruct(first.shape, first.dtype, layout=_LAYOUT)
    )
    def take(_, *matrices):
        registers = np.stack([matrix.registers.take(half, _HALF_AXIS) for matrix in matrices], _HALF_AXIS)
        return mgpu.FragmentedArray(_registers=registers, _layout=matrices[0].layout, _is_signed=None)

    return take(first, second)


def _primitive() -> Primitive:
    """An ordinary function anywhere but in a kernel on a GPU: the interpreter does not take inlined code."""
    primitive = Primitive("halves_of_rows")
    primitive.def_impl(_by_rows)
    primitive.def_abstract_eval(lambda first, second, *, half: first.update(weak_type=False))
    mlir.register_lowering(primitive, mlir.lower_fun(_by_rows, multiple_results=False))
    for semantics in (mgpu.LoweringSemantics.Lane, mgpu.LoweringSemantics.Warpgroup):
        lowering.register_lowering_rule(primitive, semantics)(lowering._lower_fun(_by_registers))
    return primitive


_halves = _primitive()
