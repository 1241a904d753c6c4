"""What threads have, rearranged inside a kernel: as rows and columns say it, in the interpreter and on a GPU."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv.mosaic import CHUNK, PIECE, load, matrices
from pallas_kernels.fft_conv.rearranged import (
    PACKED,
    exchanged,
    fragment,
    fragment_shape,
    fragments,
    in_thread_order,
    load_fragment,
    packed,
    parts,
    unpacked,
)
from tests.kernels.interpreter import interpreted

ROWS, COLUMNS = 64, 64


def rearrange(pair, tables):
    """The kernel: both halves of the pair `(2, 64, 64)`, and of tables each piece unpacked, and packed once more."""

    def rearranging_kernel(pair, tables, halves, pieces, again, matrix, table, piece, barrier):
        plgpu.copy_gmem_to_smem(pair, matrix, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_gmem_to_smem(tables, table, barrier)
        plgpu.barrier_wait(barrier)
        values = exchanged(load(matrix.at[0]), load(matrix.at[1]))
        plgpu.commit_smem()
        for number, value in enumerate(values):
            matrix[number] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(matrix, halves)
        plgpu.wait_smem_to_gmem(0)
        for number in range(COLUMNS // PIECE):
            parts = unpacked(table.at[number])
            again[number] = packed(*parts)
            for part, value in enumerate(parts):
                piece[:, part * PIECE : (part + 1) * PIECE] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(piece, pieces.at[number])
            plgpu.wait_smem_to_gmem(0)

    out = (
        jax.ShapeDtypeStruct(pair.shape, pair.dtype),
        jax.ShapeDtypeStruct((COLUMNS // PIECE, ROWS, CHUNK), jnp.float32),
        jax.ShapeDtypeStruct(tables.shape, jnp.float32),
    )
    scratch = {
        "matrix": matrices(pair.shape, pair.dtype),
        "table": plgpu.SMEM(tables.shape, jnp.float32),
        "piece": matrices((ROWS, CHUNK), jnp.float32, columns=PIECE),
        "barrier": plgpu.Barrier(num_arrivals=1),
    }
    return plgpu.kernel(rearranging_kernel, out_type=out, scratch_types=scratch)(pair, tables)


def inputs(dtype):
    pair = jnp.arange(2 * ROWS * COLUMNS).reshape(2, ROWS, COLUMNS) % 251
    re, im = jax.random.normal(jax.random.key(0), (2, ROWS // 2, COLUMNS))
    return pair.astype(dtype), re, im


def check(results, pair, re, im):
    halves, pieces, again = map(np.asarray, results)
    rows = np.arange(ROWS).reshape(4, 2, 8)
    for half, got in enumerate(halves):
        for matrix in (0, 1):
            np.testing.assert_array_equal(got[rows[:, matrix]], np.asarray(pair)[matrix][rows[:, half]])
    columns = pieces.reshape(-1, ROWS, 2, PIECE).transpose(2, 1, 0, 3).reshape(2, ROWS, COLUMNS)
    for got, want in zip(columns, (re, im), strict=True):
        for copy in (0, 1):
            np.testing.assert_array_equal(got[rows[:, copy]].reshape(ROWS // 2, COLUMNS), np.asarray(want))
    np.testing.assert_array_equal(again, in_thread_order(re, im))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_it_means(dtype):
    pair, re, im = inputs(dtype)
    with interpreted():
        check(jax.jit(rearrange)(pair, in_thread_order(re, im)), pair, re, im)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_it_does_on_a_gpu(dtype):
    pair, re, im = inputs(dtype)
    check(jax.jit(rearrange)(pair, in_thread_order(re, im)), pair, re, im)


def test_it_lowers_for_a_gpu():
    tables = jax.ShapeDtypeStruct((COLUMNS // PIECE, *PACKED), jnp.float32)
    lowered = jax.jit(rearrange).trace(jax.ShapeDtypeStruct((2, ROWS, COLUMNS), jnp.bfloat16), tables)
    assert "rearranging_kernel" in lowered.lower(lowering_platforms=("cuda",)).as_text()


def take_fragments(whole):
    """The kernel: both parts of each piece in fragments, and these of the parts once more; from either memory."""

    def fragments_kernel(whole, pieces, again, table, piece, barrier):
        plgpu.copy_gmem_to_smem(whole, table, barrier)
        plgpu.barrier_wait(barrier)
        for number in range(whole.shape[0]):
            both = parts(load_fragment((table if number % 2 else whole).at[number]))
            again[number] = fragment(*both)
            for part, value in enumerate(both):
                piece[:, part * PIECE : (part + 1) * PIECE] = value.astype(jnp.float32)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(piece, pieces.at[number])
            plgpu.wait_smem_to_gmem(0)

    out = (
        jax.ShapeDtypeStruct((whole.shape[0], ROWS, CHUNK), jnp.float32),
        jax.ShapeDtypeStruct(whole.shape, whole.dtype),
    )
    scratch = {
        "table": plgpu.SMEM(whole.shape, whole.dtype),
        "piece": matrices((ROWS, CHUNK), jnp.float32, columns=PIECE),
        "barrier": plgpu.Barrier(num_arrivals=1),
    }
    return plgpu.kernel(fragments_kernel, out_type=out, scratch_types=scratch)(whole)


def check_fragments(dtype):
    re, im = jax.random.normal(jax.random.key(2), (2, ROWS, COLUMNS)).astype(dtype)
    whole = fragments(re, im)
    pieces, again = map(np.asarray, jax.jit(take_fragments)(whole))
    columns = pieces.reshape(-1, ROWS, 2, PIECE).transpose(2, 1, 0, 3).reshape(2, ROWS, COLUMNS)
    for got, want in zip(columns, (re, im), strict=True):
        np.testing.assert_array_equal(got, want.astype(jnp.float32))
    np.testing.assert_array_equal(again, whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_fragments_mean(dtype):
    with interpreted():
        check_fragments(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_fragments_are_on_a_gpu(dtype):
    check_fragments(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fragments_lower_for_a_gpu(dtype):
    whole = jax.ShapeDtypeStruct((COLUMNS // PIECE, *fragment_shape(dtype)), jnp.dtype(dtype))
    assert "fragments_kernel" in jax.jit(take_fragments).trace(whole).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_thread_has_two_columns_of_two_rows(dtype):
    """As the layout of the tensor cores' results says it: thread 32 w + 4 i + j has rows 16 w + i and 16 w + 8 + i."""
    z = np.arange(ROWS)[:, None] * 2 + 1j * np.arange(PIECE)  # to be exact in bfloat16
    (whole,) = np.asarray(fragments(jnp.asarray(z.real, dtype), jnp.asarray(z.imag, dtype)), np.float32)
    of_threads = whole.reshape(-1, 128, fragment_shape(dtype)[1]).swapaxes(0, 1).reshape(4, 8, 4, 2, 2, 2)
    for (warp, i, j, part, half, column), number in np.ndenumerate(of_threads):
        value = z[16 * warp + 8 * half + i, 2 * j + column]
        assert number == (value.imag if part else value.real)


def test_halves_exchanged_twice_are_as_before():
    first, second = jax.random.normal(jax.random.key(1), (2, ROWS, COLUMNS))
    for got, want in zip(exchanged(*exchanged(first, second)), (first, second), strict=True):
        np.testing.assert_array_equal(got, want)
