"""What threads have, rearranged inside a kernel: as rows and columns say it, in the interpreter and on a GPU."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv.mosaic import CHUNK, PIECE, load, matrices
from pallas_kernels.fft_conv.rearranged import PACKED, exchanged, in_thread_order, packed, unpacked
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


def test_halves_exchanged_twice_are_as_before():
    first, second = jax.random.normal(jax.random.key(1), (2, ROWS, COLUMNS))
    for got, want in zip(exchanged(*exchanged(first, second)), (first, second), strict=True):
        np.testing.assert_array_equal(got, want)
