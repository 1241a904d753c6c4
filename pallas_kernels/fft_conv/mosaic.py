"""The vocabulary of the kernels: matrices in shared memory, their products, and elementwise work on them."""

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir.dialects import llvm  # what is inlined has no public dialects
from jax.extend.mlir import ir

from pallas_kernels.fft_conv.primitives import primitive

F32 = jnp.float32
CHUNK = 16
"""The narrowest columns that a matrix of 16-bit numbers in shared memory is cut to."""
PIECE = 8
"""Columns that elementwise work takes at a time, the narrowest a value in registers is cut to."""

_TILE = plgpu.Layout.WGMMA


def _tiled(columns: int, itemsize: int):
    """The shared-memory layout of rows of that many numbers that TMA writes and the tensor cores read."""
    swizzle = min(itemsize * columns, 128)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def matrices(shape, dtype, columns: int | None = None):
    """Shared memory for matrices; those that meet in a product are laid out for the one with fewer columns.

    What only elementwise work reads is laid out for `CHUNK` columns, to be read in such pieces.
    """
    return plgpu.SMEM(shape, dtype, transforms=_tiled(columns or shape[-1], jnp.dtype(dtype).itemsize))


def load(ref):
    """The matrix in the registers' layout of the tensor cores' results."""
    return plgpu.load(ref, layout=_TILE)


def persistent_kernel(body, out_type, scratch, blocks: int, warpgroups: int):
    """A launch of `blocks` blocks of so many warpgroups; the body finds itself by the axes "block" and "warpgroup".

    The body orders by itself what its threads share: stores and reads of one matrix in shared memory are of the same
    elements in each thread, or a commit or a barrier lies between. Mosaic, left to it, puts one before and after each,
    24 instead of 8 in the forward kernel of 4096 steps.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types={"scratch": scratch},
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )


def sums_of_products(*sums):
    """For each list of pairs the sum of the matrix products a b, in float32; all are issued before any is awaited."""

    def run(*accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        *first, last = [accumulator[...] for accumulator in accumulators]
        return [*first, _zero_kept.bind(last)]

    return pl.run_scoped(run, *(plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), F32) for pairs in sums))


def _use_zero(x):
    """The matrix as it is, and an instruction that is none, but has a zero for an operand.

    A zero that is needed still, the compiler does not make the last accumulator of, and then finds that all of them
    begin with zero, which the products can by themselves. Otherwise it copies it to each: 97 of 638 instructions of a
    forward transform of 4096 points.
    """

    @plgpu.inline_mgpu(arg_types=(_TILE,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=_TILE))
    def use(_, x):
        zero = mgpu.c(0, ir.IntegerType.get_signless(32))
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [zero], "", "r", has_side_effects=True)
        return x

    return use(x)


_zero_kept = primitive("zero_kept", lambda x: x, _use_zero)


def add_products(totals, *sums):
    """The totals, values in float32, each with the sum of the matrix products of its list of pairs.

    To keep accumulators as references from tile to tile instead costs registers: what compiled to 8 bytes of spilled
    registers like this, with 128 of them for totals, compiled to 776 so.
    """

    def run(*accumulators):
        for accumulator, total in zip(accumulators, totals, strict=True):
            accumulator[...] = total
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(run, *(plgpu.ACC(total.shape, F32) for total in totals))


def complex_planes(ref, zero):
    """The real and imaginary planes of a table."""
    return ref.at[zero], ref.at[zero + 1]


def by_columns(function, *matrices):
    """Elementwise function of matrices, values or in shared memory, to a tuple, a few columns at a time.

    Emitted whole, it would hold every float32 intermediate of the tile at once, over 200 registers.
    """
    results = []
    for at in range(0, matrices[0].shape[1], CHUNK):
        wide = [
            matrix[:, at : at + CHUNK] if isinstance(matrix, jax.Array) else load(matrix.at[:, pl.ds(at, CHUNK)])
            for matrix in matrices
        ]
        results += [function(*(x[:, i : i + PIECE] for x in wide)) for i in range(0, CHUNK, PIECE)]
    return tuple(lax.concatenate(parts, 1) for parts in zip(*results, strict=True))
