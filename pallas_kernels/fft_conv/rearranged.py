"""What a thread has in registers, rearranged at no cost: other matrices of the same numbers.

In the registers' layout of the tensor cores' results a warp has 16 rows of a matrix of 64, and a thread has of two of
them, i and i + 8, the same columns, two of every eight. So it may take the first 8 of each 16 rows of two matrices for
one matrix and the last 8 for another. What a product leaves as real parts in rows 16 w + i and imaginary parts in rows
16 w + 8 + i, i < 8, of each of two sequences, are then the real parts of both and their imaginary parts, in one thread.

What multiplies both sequences is kept in the order in which threads take it, both parts of two columns side by side, so
that one load of 16 bytes brings a thread's share of eight columns in float32, and nothing has to be converted. Of 64
complex rows a thread's share of eight columns, its fragment, is eight numbers: one load in 16 bits, two in float32.
"""

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir.dialects import llvm  # what is inlined has no public dialects
from jax.extend.mlir import ir

from pallas_kernels.fft_conv.config import N1
from pallas_kernels.fft_conv.mosaic import PIECE
from pallas_kernels.fft_conv.primitives import primitive

PACKED = 4, 128
"""Of the float32 numbers that a warpgroup takes with eight columns of 32 complex rows, by warps."""

_TILE = plgpu.Layout.WGMMA
_STRIDED = plgpu.Layout.WG_STRIDED(PACKED, 4)
_HALF_AXIS = 4
"""Of the array of registers of a matrix: which 8 of 16 rows."""
_THREADS = 128


def exchanged(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first 8 of each 16 rows of two matrices `(64, n)` of a kernel, in turns, and the last 8; its own inverse.

    Example:
      >>> first, second = (jnp.full((64, 8), number) for number in (1, 2))
      >>> [[int(x) for x in part[:24:8, 0]] for part in exchanged(first, second)]
      [[1, 2, 1], [1, 2, 1]]
    """
    upper, lower = (_halves.bind(first, second, half=half) for half in (0, 1))
    return upper, lower


def in_thread_order(re: jax.Array, im: jax.Array) -> jax.Array:
    """Complex matrices `(..., 32, n)` as `(..., n / 8, 4, 128)` in float32, eight columns after the other.

    Example:
      >>> in_thread_order(jnp.zeros((32, 64)), jnp.zeros((32, 64))).shape
      (8, 4, 128)
    """
    cut = jnp.stack([re, im], -1).reshape(*re.shape[:-2], 4, 8, -1, 4, 2, 2)
    columns_first = jnp.moveaxis(cut, -4, -6).swapaxes(-1, -2)
    return columns_first.astype(jnp.float32).reshape(*re.shape[:-2], -1, *PACKED)


def unpacked(ref) -> tuple[jax.Array, jax.Array]:
    """Real and imaginary parts of eight columns that lie so in shared memory, `(64, 8)`, every eight rows twice."""
    x = plgpu.load(ref, layout=_STRIDED)
    re, im = (_part.bind(x, part=part) for part in (0, 1))
    return re, im


def packed(re: jax.Array, im: jax.Array) -> jax.Array:
    """The first 8 of each 16 rows of eight columns, as `unpacked` takes them."""
    return _packed.bind(re, im)


def fragment_shape(dtype) -> tuple[int, int]:
    """Of the numbers that a warpgroup takes with eight columns of 64 complex rows: loads by threads, and 16 bytes.

    Example:
      >>> [fragment_shape(dtype) for dtype in ("bfloat16", "float32")]
      [(128, 8), (256, 4)]
    """
    each = 16 // jnp.dtype(dtype).itemsize
    return 2 * N1 * PIECE // each, each


def fragments(re: jax.Array, im: jax.Array) -> jax.Array:
    """Complex matrices `(..., 64, n)` as `(..., n / 8, *fragment_shape(dtype))`, eight columns after the other.

    Example:
      >>> fragments(jnp.zeros((64, 64)), jnp.zeros((64, 64))).shape
      (8, 256, 4)
    """
    *outer, _, n = re.shape
    # ..., warp, half, i, piece, j, column; part first of a thread's numbers
    cut = jnp.stack([re, im], -1).reshape(*outer, 4, 2, 8, n // PIECE, 4, 2, 2)
    of_threads = cut.transpose(*range(len(outer)), *(len(outer) + axis for axis in (3, 0, 2, 4, 6, 1, 5)))
    loads, each = fragment_shape(re.dtype)
    by_loads = of_threads.reshape(*outer, n // PIECE, _THREADS, loads // _THREADS, each).swapaxes(-3, -2)
    return by_loads.reshape(*outer, n // PIECE, loads, each)


def from_fragments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both parts, complex matrices `(..., 64, n)`, of `fragments`.

    Example:
      >>> [part.shape for part in from_fragments(jnp.zeros((3, 8, 256, 4)))]
      [(3, 64, 64), (3, 64, 64)]
    """
    *outer, pieces, loads, each = x.shape
    of_threads = x.reshape(*outer, pieces, loads // _THREADS, _THREADS, each).swapaxes(-3, -2)
    # warp, i, j, part, half, column of each piece
    cut = of_threads.reshape(*outer, pieces, 4, 8, 4, 2, 2, 2)
    rows_first = cut.transpose(*range(len(outer)), *(len(outer) + axis for axis in (4, 1, 5, 2, 0, 3, 6)))
    re, im = jnp.moveaxis(rows_first.reshape(*outer, 2, N1, pieces * PIECE), -3, 0)
    return re, im


def load_fragment(ref) -> jax.Array:
    """Eight columns that lie so in any memory, in registers as they are."""
    return plgpu.load(ref, layout=_fragment_layout(ref.dtype))


def parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Real and imaginary parts, `(64, 8)`, of what `load_fragment` loads."""
    re, im = (_fragment_part.bind(x, part=part) for part in (0, 1))
    return re, im


def fragment(re: jax.Array, im: jax.Array) -> jax.Array:
    """Of those parts, as `load_fragment` loads it."""
    return _fragment_of.bind(re, im)


def _fragment_layout(dtype):
    shape = fragment_shape(dtype)
    return plgpu.Layout.WG_STRIDED(shape, shape[1])


def _fragment_part_by_rows(x, *, part: int):
    loads, each = x.shape
    of_threads = x.reshape(loads // _THREADS, _THREADS, each).swapaxes(0, 1).reshape(4, 8, 4, 2, 2, 2)
    return of_threads[:, :, :, part].transpose(0, 3, 1, 2, 4).reshape(N1, PIECE)


def _fragment_part_by_registers(x, *, part: int):
    @plgpu.inline_mgpu(
        arg_types=(_fragment_layout(x.dtype),),
        return_type=plgpu.ShapeDtypeStruct((N1, PIECE), x.dtype, layout=_TILE),
    )
    def take(_, fragment):
        each = x.shape[1]
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((N1, PIECE)), object)
        for half in (0, 1):
            load, place = divmod(4 * part + 2 * half, each)
            source = fragment.registers.flat[load]
            registers.swapaxes(0, _HALF_AXIS)[half] = _vector([source] * 2, [place, place + 1])
        return _matrix(registers)

    return take(x)


def _fragment_by_rows(re, im):
    (whole,) = fragments(re, im)
    return whole


def _fragment_by_registers(re, im):
    shape = loads, each = fragment_shape(re.dtype)

    @plgpu.inline_mgpu(
        arg_types=(_TILE, _TILE),
        return_type=plgpu.ShapeDtypeStruct(shape, re.dtype, layout=_fragment_layout(re.dtype)),
    )
    def take(_, *matrices):
        pairs = [matrix.registers.take(half, _HALF_AXIS).item() for matrix in matrices for half in (0, 1)]
        numbers = [(pair, place) for pair in pairs for place in (0, 1)]
        registers = np.empty(loads // _THREADS, object)
        for load in range(registers.size):
            registers[load] = _vector(*zip(*numbers[load * each : (load + 1) * each], strict=True))
        layout = mgpu.WGStridedFragLayout(shape, each)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return take(re, im)


def _halves_by_rows(first, second, *, half: int):
    parts = [x.reshape(4, 2, 8, x.shape[1])[:, half] for x in (first, second)]
    return jnp.stack(parts, 1).reshape(first.shape)


def _halves_by_registers(first, second, *, half: int):
    @plgpu.inline_mgpu(
        arg_types=(_TILE, _TILE), return_type=plgpu.ShapeDtypeStruct(first.shape, first.dtype, layout=_TILE)
    )
    def take(_, *matrices):
        return _matrix(np.stack([matrix.registers.take(half, _HALF_AXIS) for matrix in matrices], _HALF_AXIS))

    return take(first, second)


def _part_by_rows(x, *, part: int):
    rows = x.reshape(4, 1, 8, 4, 2, 2)[..., part, :]
    return jnp.broadcast_to(rows, (4, 2, 8, 4, 2)).reshape(N1, PIECE)


def _part_by_registers(x, *, part: int):
    @plgpu.inline_mgpu(
        arg_types=(_STRIDED,), return_type=plgpu.ShapeDtypeStruct((N1, PIECE), jnp.float32, layout=_TILE)
    )
    def take(_, packed):
        (register,) = packed.registers.flat
        pair = _vector([register] * 2, [2 * part, 2 * part + 1])
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((N1, PIECE)), object)
        registers[...] = pair
        return _matrix(registers)

    return take(x)


def _packed_by_rows(re, im):
    parts = [x.reshape(4, 2, 8, 4, 2)[:, 0] for x in (re, im)]
    return jnp.stack(parts, -2).reshape(PACKED)


def _packed_by_registers(re, im):
    @plgpu.inline_mgpu(
        arg_types=(_TILE, _TILE), return_type=plgpu.ShapeDtypeStruct(PACKED, jnp.float32, layout=_STRIDED)
    )
    def take(_, *matrices):
        pairs = [matrix.registers.take(0, _HALF_AXIS).item() for matrix in matrices]
        register = _vector([pairs[0]] * 2 + [pairs[1]] * 2, [0, 1, 0, 1])
        registers = np.array([None])
        registers[0] = register
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGStridedFragLayout(PACKED, 4), _is_signed=None)

    return take(re, im)


def _matrix(registers):
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def _vector(sources, places):
    """Of elements of registers."""
    i32 = ir.IntegerType.get_signless(32)
    element_type = ir.VectorType(sources[0].type).element_type
    result = llvm.mlir_undef(ir.VectorType.get((len(sources),), element_type))
    for number, (source, place) in enumerate(zip(sources, places, strict=True)):
        element = llvm.extractelement(source, mgpu.c(place, i32))
        result = llvm.insertelement(result, element, mgpu.c(number, i32))
    return result


_halves = primitive("halves_of_rows", _halves_by_rows, _halves_by_registers)
_part = primitive("part_of_packed", _part_by_rows, _part_by_registers)
_packed = primitive("packed_parts", _packed_by_rows, _packed_by_registers)
_fragment_of = primitive("fragment_of_parts", _fragment_by_rows, _fragment_by_registers)
_fragment_part = primitive("part_of_fragments", _fragment_part_by_rows, _fragment_part_by_registers)
