"""bfloat16 to float32 inside a kernel: every number there is."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fft_conv.mosaic import load, matrices
from pallas_kernels.fft_conv.widening import widened
from tests.kernels.interpreter import interpreted

ROWS, COLUMNS, TILES = 64, 64, 16


def widen(x):
    """The kernel; `(tiles, 64, 64)`."""

    def widening_kernel(x, y, narrow, wide, barrier):
        for tile in range(TILES):
            plgpu.copy_gmem_to_smem(x.at[tile], narrow, barrier)
            plgpu.barrier_wait(barrier)
            wide[...] = widened(load(narrow))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(wide, y.at[tile])
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "narrow": matrices((ROWS, COLUMNS), jnp.bfloat16),
        "wide": matrices((ROWS, COLUMNS), jnp.float32),
        "barrier": plgpu.Barrier(num_arrivals=1),
    }
    return plgpu.kernel(widening_kernel, out_type=jax.ShapeDtypeStruct(x.shape, jnp.float32), scratch_types=scratch)(x)


def every_number():
    return np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16).reshape(TILES, ROWS, COLUMNS)


def check(got):
    """A bfloat16 number is the upper half of a float32 one; which NaN it is does not matter."""
    want = np.arange(1 << 16, dtype=np.uint32) << 16
    number = ~np.isnan(want.view(np.float32))
    got = np.asarray(got).reshape(-1)
    np.testing.assert_array_equal(got.view(np.uint32)[number], want[number])
    assert np.isnan(got[~number]).all()


def test_every_number_interpreted():
    with interpreted():
        check(jax.jit(widen)(every_number()))


@pytest.mark.gpu
def test_every_number_on_a_gpu():
    check(jax.jit(widen)(every_number()))


def test_it_lowers_for_a_gpu():
    lowered = jax.jit(widen).trace(jax.ShapeDtypeStruct((TILES, ROWS, COLUMNS), jnp.bfloat16))
    assert "widening_kernel" in lowered.lower(lowering_platforms=("cuda",)).as_text()
