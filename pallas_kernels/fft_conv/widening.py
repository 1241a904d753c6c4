"""bfloat16 to float32 in two instructions for each pair of numbers, inside a kernel.

A register holds two bfloat16 numbers, and each is the upper half of the float32 number that it is: a shift makes one
of it and a mask the other. The compiler shifts the upper one down first, and takes three: 6 % more instructions in the
inner rows of long sequences. Sequences of float16, whose numbers take an instruction each, were 7 to 10 % faster.
"""

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir.dialects import arith, llvm  # what is inlined has no public dialects
from jax.extend.mlir import ir

from pallas_kernels.fft_conv.primitives import primitive

_LAYOUT = plgpu.Layout.WGMMA


def widened(x: jax.Array) -> jax.Array:
    """A matrix of a kernel, in the registers' layout of the tensor cores' results, in float32.

    Example:
      >>> widened(jnp.array([[1.5, -2.0]], "bfloat16"))
      Array([[ 1.5, -2. ]], dtype=float32)
    """
    return _widened.bind(x) if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def _by_halves(x):
    """What the GPU does."""

    @plgpu.inline_mgpu(arg_types=(_LAYOUT,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=_LAYOUT))
    def widen(_, pairs):
        registers = np.empty_like(pairs.registers)
        for place, pair in np.ndenumerate(pairs.registers):
            registers[place] = _floats(pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=pairs.layout, _is_signed=None)

    return widen(x)


def _floats(pair):
    """Two float32 numbers of two bfloat16 ones."""
    i32 = ir.IntegerType.get_signless(32)
    word = llvm.bitcast(i32, pair)
    halves = arith.shli(word, mgpu.c(16, i32)), arith.andi(word, mgpu.c(-(1 << 16), i32))
    words = llvm.mlir_undef(ir.VectorType.get((2,), i32))
    for place, half in enumerate(halves):
        words = llvm.insertelement(words, half, mgpu.c(place, i32))
    return llvm.bitcast(ir.VectorType.get((2,), ir.F32Type.get()), words)


_widened = primitive("widened_bfloat16", lambda x: x.astype(jnp.float32), _by_halves)
