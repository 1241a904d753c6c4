"""The kernel of the taps' spectra in a learned long sequence: the way there of each row, alone.

The taps of a feature are one more sequence: split, then transformed row by row to the spectrum that the convolution
multiplies by, C = (T * (F1 Z)) F2 of `learned_rows_forward_sm90`, half of its products. That is in float16 whatever the
convolution is in; numbers are divided by the largest of their feature, by which, in float32, C is multiplied.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.config import N1, TILE
from pallas_kernels.fft_conv.learned_rows import Schedule, Shapes
from pallas_kernels.fft_conv.learned_rows_forward_sm90 import Rows, scratch_types
from pallas_kernels.fft_conv.mosaic import persistent_kernel

WARPGROUPS = 3
"""Of a block, each with a row to itself: with four, of 128 registers, products would wait for each other."""

_TABLES = "f1", "f2", "twiddle"


def transform(shapes: Shapes, dtype):
    """The kernel (z, scale, f1, f2, twiddle, [31]) -> spectra `(B, m, re | im, 64, 64)` in that dtype.

    z is `(B, 1, 1, re | im m, 64, 64)`, of features one by one as a batch, scale `(B,)` in float32, and
    `learned_rows_forward_sm90.Tables` says what the others are.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> shapes = Shapes(3, 1, 4, jnp.float16)
      >>> table = lambda *leading: jax.ShapeDtypeStruct((*leading, 64, 64), jnp.float16)
      >>> scale, shift = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
      >>> operands = shapes.sequences, scale, table(4, 3), table(2), table(4, 2), shift
      >>> jax.eval_shape(transform(shapes, jnp.bfloat16), *operands)
      ShapeDtypeStruct(shape=(3, 4, 2, 64, 64), dtype=bfloat16)
    """
    schedule = Schedule(shapes, WARPGROUPS)

    def learned_rows_transform(z, scale, *refs, scratch):
        *tables, shift, out = refs
        group, k0 = lax.axis_index("warpgroup"), schedule.k0
        rows = Rows(schedule, z, scratch, group, k0)
        rows.fetch(jnp.int32(0), 0)
        rows.fetch_tables(dict(zip(_TABLES, tables, strict=True)))
        plgpu.barrier_wait(scratch["barriers"]["tables"])

        def work_on(visit, step, fresh):
            spectrum = rows.spectrum(step, fresh)
            _, sequence, _ = schedule.at(step + fresh(), group)
            factor = scale[sequence]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last spectrum has left its place
            for part, value in zip(rows.row("w", fresh()), spectrum, strict=True):
                part[...] = (value * factor).astype(dtype)
            plgpu.commit_smem()
            for plane, part in enumerate(rows.row("w", fresh())):
                plgpu.copy_smem_to_gmem(part, out.at[sequence, k0, plane])

        rows.each(shift[0], work_on)

    result = jax.ShapeDtypeStruct((shapes.batch, shapes.rows, 2, N1, TILE), dtype)
    scratch = scratch_types(schedule, _TABLES, dtype)
    return persistent_kernel(learned_rows_transform, result, scratch, schedule.grid, WARPGROUPS)
