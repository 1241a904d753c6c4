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
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, PIECE, by_columns, matrices, persistent_kernel, sums_of_products
from pallas_kernels.fft_conv.rearranged import fragment, fragment_shape
from pallas_kernels.fft_conv.tables import block_scale


def split(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """X as the sum of two numbers of a 16-bit dtype, (high, low)."""
    high = x.astype(dtype)
    return high, (x - high.astype(x.dtype)).astype(dtype)


def tap_spectra(
    taps: jax.Array, config: Config, dtype, f1, f2, twiddle, shift, *, before: bool, in_fragments: bool = False
) -> jax.Array:
    """`tables.tap_spectra` in a 16-bit dtype, `(count, lags, 2, 64, n2)`, by one kernel.

    Args:
      taps: `(count, blocks, n)` in float32: consecutive blocks of n lags; a single one may be shorter.
      config: whose order and scale the spectra take.
      dtype: bfloat16 or float16.
      f1: this and the next two are the tables in float32.
      f2: see f1.
      twiddle: see f1.
      shift: `[31]`, by which `chain.opaque_zeros` makes its zeros.
      before: whether the first block lies before the first lag; without it, zeros do.
      in_fragments: whether a spectrum is not two planes but `rearranged.fragments`, `(n2 / 8, 128, 8)`.
    """
    n2 = config.n2
    taps = taps / (config.points * block_scale(config) ** 3)  # the chain's blocks scale by it once more
    taps = jnp.pad(taps, [(0, 0), (0, 0), (0, -taps.shape[-1] % (8 * n2))])
    halves = jnp.stack(split(taps, dtype), 2)
    halves = halves.reshape(*halves.shape[:3], -1, n2)
    tables = [jnp.concatenate(split(table, dtype)) for table in (f1[:2], f2, twiddle)]
    return _kernel(config, halves.shape, dtype, before, in_fragments)(halves, *tables, shift)


def tap_transform(n2: int, blocks: int, dtype, before: bool, in_fragments: bool = False):
    """`tap_spectra` as a function of arrays, which depends on no more of a configuration than these two numbers."""
    config = Config(n2, blocks=blocks)
    how = {"before": before, "in_fragments": in_fragments}
    return lambda taps, *tables: tap_spectra(taps, config, dtype, *tables, **how)


def _kernel(config: Config, shape, dtype, before: bool, in_fragments: bool):
    """The kernel (halves of the taps, f1, f2, twiddle) -> spectra; the tables' low halves follow their high ones.

    A warpgroup goes through the blocks of an item, and keeps one's transform in registers for the next:

        K_l = F(block l) + i F(block l - 1)
    """
    count, blocks, _, length, n2 = shape
    groups = 4 if n2 == 16 else 2  # as many as shared memory and registers have room for
    grid = min(config.blocks, pl.cdiv(count, groups))
    steps = pl.cdiv(count, grid * groups) * blocks

    def fft_conv_spectrum(taps, f1, f2, twiddle, shift, out, scratch):
        shift_by = shift[0]
        barriers = scratch["barriers"]
        group = lax.axis_index("warpgroup")

        def at(step):
            item = ((step // blocks) * grid + lax.axis_index("block")) * groups + group
            return item, lax.rem(step, blocks), item < count

        def fetch(step):
            item, block, work = at(step)
            slot = lax.rem(step, 2)

            @pl.when(work & (step < steps))
            def _():
                for half in (0, 1):
                    plgpu.copy_gmem_to_smem(
                        taps.at[item, block, half],
                        scratch["taps"].at[group, slot, half, pl.ds(0, length)],
                        barriers["taps"].at[2 * group + slot],
                    )

        if length < N1:
            for slot in range(2):
                for half in range(2):
                    scratch["taps"][group, slot, half] = jnp.zeros((N1, n2), dtype)
            plgpu.commit_smem()
        fetch(jnp.int32(0))

        @pl.when(group == 0)
        def _():
            for name, table in (("f1", f1), ("f2", f2), ("twiddle", twiddle)):
                for plane in range(4):
                    plgpu.copy_gmem_to_smem(table.at[plane], scratch[name].at[plane], barriers["tables"])

        plgpu.barrier_wait(barriers["tables"])

        def step(step, last):
            item, block, work = at(step)

            def transform(last):
                fetch(step + 1)
                zero = lax.shift_right_logical(step, shift_by)
                slot = lax.rem(step, 2)
                plgpu.barrier_wait(barriers["taps"].at[2 * group + slot])
                high, low = (scratch["taps"].at[group + zero, slot, half] for half in (0, 1))

                def left(plane):
                    f1_high, f1_low = (scratch["f1"].at[zero + p] for p in (plane, plane + 2))
                    return [(f1_high, high), (f1_high, low), (f1_low, high)]

                twiddles = (scratch["twiddle"].at[zero + plane] for plane in range(4))
                z = by_columns(_times_split(dtype), *sums_of_products(left(0), left(1)), *twiddles)
                re, re_low, im, im_low = z

                def right(plane):
                    columns = pl.ds(plane * n2, n2)
                    top, bottom, top_low, bottom_low = (scratch["f2"].at[zero + p, :, columns] for p in range(4))
                    pairs = [(re, top), (re_low, top), (re, top_low), (im, bottom), (im_low, bottom), (im, bottom_low)]
                    return sums_of_products(pairs)[0]

                this = right(0), right(1)  # both at once would need more than 255 registers

                # The last result has left its place, and all of the warpgroup has read these taps.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                weight = jnp.where(block > 0, 1.0, 0.0)
                spectrum = by_columns(
                    lambda a, b, c, d: ((a - weight * d).astype(dtype), (b + weight * c).astype(dtype)), *this, *last
                )
                if not in_fragments:
                    result = scratch["staging"].at[group + zero]
                    for plane in (0, 1):
                        result.at[plane][...] = spectrum[plane]
                    plgpu.commit_smem()

                @pl.when(block >= before)
                def _():
                    place = out.at[item, block - before]
                    if not in_fragments:
                        for plane in (0, 1):
                            plgpu.copy_smem_to_gmem(result.at[plane], place.at[plane])
                        return
                    for piece in range(n2 // PIECE):
                        columns = slice(piece * PIECE, (piece + 1) * PIECE)
                        place[piece] = fragment(*(plane[:, columns] for plane in spectrum))

                return this

            return lax.cond(work, transform, lambda last: last, last)

        nothing = plgpu.layout_cast(jnp.zeros((N1, n2), F32), plgpu.Layout.WGMMA)
        lax.fori_loop(0, steps, step, (nothing, nothing))
        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "f1": matrices((4, N1, N1), dtype, columns=n2),
        "f2": matrices((4, n2, 2 * n2), dtype, columns=n2),
        "twiddle": matrices((4, N1, n2), dtype, columns=CHUNK),
        "taps": matrices((groups, 2, 2, N1, n2), dtype),
        **({} if in_fragments else {"staging": matrices((groups, 2, N1, n2), dtype)}),
        "barriers": {
            "tables": plgpu.Barrier(num_arrivals=12),
            "taps": plgpu.Barrier(num_arrivals=2, num_barriers=2 * groups),
        },
    }
    spectrum = (n2 // PIECE, *fragment_shape(dtype)) if in_fragments else (2, N1, n2)
    out = jax.ShapeDtypeStruct((count, blocks - before, *spectrum), dtype)
    return persistent_kernel(fft_conv_spectrum, out, scratch, grid, groups)


def _times_split(dtype):
    """(a + ib) times a twiddle that comes in halves; in halves, the real part's and the imaginary part's."""

    def times(a, b, c, d, c_low, d_low):
        c, d = (high.astype(F32) + low.astype(F32) for high, low in ((c, c_low), (d, d_low)))
        return *split(a * c - b * d, dtype), *split(a * d + b * c, dtype)

    return times
