"""The kernel that transforms taps into the spectrum that the convolution kernels multiply by.

It is the first half of their chain, once for each channel and feature, but with every 16-bit factor split in two: x is
x_high + x_low, to sixteen bits of mantissa or more, and of a product's four parts the three larger ones are summed. The
spectrum's error is then that of its own rounding, for a 64th of the convolution's work at a batch of 64. `jnp.fft`
would be as exact, but takes 0.04 ms at 1024 points on an H200, a fifth of the whole convolution.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.config import N1, Config
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, by_columns, matrices, sums_of_products
from pallas_kernels.fft_conv.tables import block_scale


def split(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """X as the sum of two numbers of a 16-bit dtype, (high, low)."""
    high = x.astype(dtype)
    return high, (x - high.astype(x.dtype)).astype(dtype)


def tap_spectrum(taps: jax.Array, config: Config, dtype, f1, f2, twiddle, shift) -> jax.Array:
    """`tables.tap_spectrum` in a 16-bit dtype, `(count, 2, 64, n2)`, by one kernel.

    Args:
      taps: `(count, parts, K)` in float32: forward taps at their lag and, with two parts, the reverse tap of lag -m at
        n - m.
      config: whose order and scale the spectrum takes.
      dtype: bfloat16 or float16.
      f1: this and the next two are the tables in float32.
      f2: see f1.
      twiddle: see f1.
      shift: `[31]`, by which `kernel_sm90` makes its opaque zeros.
    """
    n2 = config.n2
    taps = taps / (config.points * block_scale(config) ** 3)  # the chain's blocks scale by it once more
    taps = jnp.pad(taps, [(0, 0), (0, 0), (0, -taps.shape[-1] % (8 * n2))])
    # i (a + ib) = -b + ia: the reverse taps' part of the real plane comes with a minus sign.
    parts = taps if taps.shape[1] == 1 else jnp.concatenate([taps, -taps[:, 1:]], 1)
    halves = jnp.stack(split(parts, dtype), 2)
    halves = halves.reshape(halves.shape[0], -1, halves.shape[-1] // n2, n2)
    tables = [jnp.concatenate(split(table, dtype)) for table in (f1[:2], f2, twiddle)]
    return _kernel(config, halves.shape, dtype)(halves, *tables, shift)


def _kernel(config: Config, shape, dtype):
    """The kernel (taps' halves, f1, f2, twiddle) -> spectrum; the tables' low halves follow their high ones."""
    count, parts, length, n2 = shape
    rows = config.rows
    groups = 2 if parts == 2 else 1  # what fits in shared memory
    tiles = pl.cdiv(count, rows)
    blocks = min(config.blocks, pl.cdiv(tiles, groups))
    tables_planes = {"f1": 4, "f2": 4, "twiddle": 4}

    def fft_conv_spectrum(taps, f1, f2, twiddle, shift, out, scratch):
        shift_by = shift[0]
        barriers = scratch["barriers"]
        group = lax.axis_index("warpgroup")

        @pl.when(group == 0)
        def _():
            for name, table in zip(tables_planes, (f1, f2, twiddle), strict=True):
                for plane in range(4):
                    plgpu.copy_gmem_to_smem(table.at[plane], scratch[name].at[plane], barriers["tables"])

        if length < N1:
            for r in range(rows):
                for part in range(parts):
                    scratch["taps"][group, r, part] = jnp.zeros((N1, n2), dtype)
            plgpu.commit_smem()
        plgpu.barrier_wait(barriers["tables"])

        @pl.loop(0, pl.cdiv(tiles, blocks * groups))
        def _(turn):
            first = ((turn * blocks + lax.axis_index("block")) * groups + group) * rows

            @pl.when(first < count)
            def _():
                mine = [scratch["taps"].at[group, r] for r in range(rows)]
                staging = [scratch["staging"].at[group, r] for r in range(rows)]
                for r in range(rows):
                    for part in range(parts):
                        source = taps.at[jnp.minimum(first + r, count - 1), part]
                        plgpu.copy_gmem_to_smem(source, mine[r].at[part, pl.ds(0, length)], barriers["taps"].at[group])
                plgpu.barrier_wait(barriers["taps"].at[group])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.loop(0, rows)
                def _(r):
                    zero = lax.shift_right_logical(turn + r, shift_by)
                    row, result = scratch["taps"].at[group, r], scratch["staging"].at[group, r]
                    f1_re, f1_im, f1_re_low, f1_im_low = (scratch["f1"].at[zero + plane] for plane in range(4))
                    top, bottom, top_low, bottom_low = (scratch["f2"].at[zero + plane] for plane in range(4))
                    twiddle_planes = (scratch["twiddle"].at[zero + plane] for plane in range(4))

                    def product(matrix, matrix_low, part):
                        return [(matrix, row.at[part]), (matrix, row.at[part + 1]), (matrix_low, row.at[part])]

                    re, im = product(f1_re, f1_re_low, 0), product(f1_im, f1_im_low, 0)
                    if parts > 2:
                        re += product(f1_im, f1_im_low, 4)
                        im += product(f1_re, f1_re_low, 2)
                    z = by_columns(_times_split(dtype), *sums_of_products(re, im), *twiddle_planes)
                    re, re_low, im, im_low = z
                    (both,) = sums_of_products(
                        [(re, top), (re_low, top), (re, top_low), (im, bottom), (im_low, bottom), (im, bottom_low)]
                    )
                    result[0], result[1] = both[:, :n2].astype(dtype), both[:, n2:].astype(dtype)

                plgpu.commit_smem()
                for r in range(rows):

                    @pl.when(first + r < count)
                    def _(r=r):
                        for plane in (0, 1):
                            plgpu.copy_smem_to_gmem(staging[r].at[plane], out.at[first + r, plane])

        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "f1": matrices((4, N1, N1), dtype, columns=n2),
        "f2": matrices((4, n2, 2 * n2), dtype, columns=n2),
        "twiddle": matrices((4, N1, n2), dtype, columns=CHUNK),
        "taps": matrices((groups, rows, parts, N1, n2), dtype),
        "staging": matrices((groups, rows, 2, N1, n2), dtype),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=12),
            "taps": plgpu.Barrier(num_arrivals=rows * parts, num_barriers=groups),
        },
    }
    return plgpu.kernel(
        fft_conv_spectrum,
        out_type=jax.ShapeDtypeStruct((count, 2, N1, n2), dtype),
        scratch_types={"scratch": scratch},
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="warpgroup",
    )


def _times_split(dtype):
    """(a + ib) times a twiddle that comes in halves; in halves, the real part's and the imaginary part's."""

    def times(a, b, c, d, c_low, d_low):
        c, d = (high.astype(F32) + low.astype(F32) for high, low in ((c, c_low), (d, d_low)))
        return *split(a * c - b * d, dtype), *split(a * d + b * c, dtype)

    return times
