"""The forward kernel with learned blocks: the chain of `kernel_sm90` over tables that come in, others on the way back.

With twiddles T as in `tables`, blocks F1 and F2 on the way there, V2 and V1 on the way back, a row X and a spectrum K,

    C = (T * F1 X) F2,      Y = Re V1 (conj(T) * (C * K) V2)

where exact blocks make the right-angle convolution. As `kernel_sm90` does, the kernel conjugates once, at C * K, so
that it goes back with the same twiddles and with conj(V2) and conj(V1). The blocks belong to a layer and not to a
feature: a persistent block of threads loads them once, as it loads the fixed ones, of which there are two fewer.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.chain import Butterfly, conj_times
from pallas_kernels.fft_conv.config import N1, TILE, Config
from pallas_kernels.fft_conv.mosaic import complex_planes, matrices, persistent_kernel
from pallas_kernels.fft_conv.tiles import Block, Schedule, Shapes, scratch_types


class Tables(NamedTuple):
    """What the kernel keeps in shared memory; blocks are scaled as in `tables`, to stay in the range of 16 bits."""

    f1: jax.Array
    """`(re | im, 64, 64)`, and so the first block on the way back."""
    f2: jax.Array
    """`(2, n2, re | im k2)`, real form, likewise."""
    f1_back: jax.Array
    f2_back: jax.Array
    twiddle: jax.Array
    """`(re | im, 64, n2)`."""


def default_config(n2: int, warpgroups: int | None = None, spectrum_slots: int | None = None) -> Config:
    """What is given, and else what the compiler has registers and shared memory for; none was measured.

    Example:
      >>> default_config(64)
      Config(n2=64, warpgroups=4, spectrum_slots=1, blocks=132)
    """
    return Config(n2, warpgroups or (3 if n2 == 32 else 4), spectrum_slots or (1 if n2 == TILE else 2))


class _WayBack(Butterfly):
    """The chain whose first block is stored as it is multiplied by, and not as its transpose."""

    def first_block(self, transposed: bool = False):
        return super().first_block(False)


def forward(config: Config, shapes: Shapes):
    """The kernel (u, spectrum, f1, f2, f1_back, f2_back, twiddle, [31]) -> y, without gates and of one channel.

    u is `(B, D, length, n2)`, the spectrum of the taps `(D, 2, 64, n2)`, y `(B, 1, D, length, n2)`.
    """
    dtype, n2 = shapes.dtype, config.n2
    schedule = Schedule(config, shapes.batch, shapes.features)

    def learned_fft_conv_forward(u, spectrum, f1, f2, f1_back, f2_back, twiddle, shift, out, scratch):
        block = Block(schedule, shapes, ["u"], scratch)
        shift_by = shift[0]
        block.clear("u")

        def fetch_rows(step):
            item, row, work = schedule.at(step)

            @pl.when(work)
            def _():
                block.fetch(u, lambda b: (b, item // schedule.splits), row, "u")

        fetch_rows(jnp.int32(0))
        for ahead in range(config.spectrum_slots - 1):
            block.fetch_spectrum(spectrum, lax.axis_index("block") + ahead * schedule.grid)

        @pl.when(block.group == 0)
        def _():
            for name, table in zip(Tables._fields, (f1, f2, f1_back, f2_back, twiddle), strict=True):
                for plane in (0, 1):
                    plgpu.copy_gmem_to_smem(table.at[plane], scratch[name].at[plane], block.barriers["tables"])

        plgpu.barrier_wait(block.barriers["tables"])

        @pl.loop(0, schedule.visits)
        def _(visit):
            slot = block.begin_item(spectrum, lax.axis_index("block") + visit * schedule.grid)

            @pl.loop(0, schedule.rounds)
            def _(turn):
                step = visit * schedule.rounds + turn
                item, row, work = schedule.at(step)

                @pl.when(work)
                def _():
                    zero = lax.shift_right_logical(step, shift_by)
                    mine = block.group + zero
                    tiles, staging = block.tile("u", mine), block.tile("staging", mine)
                    there = Butterfly(scratch["f1"], scratch["f2"], scratch["twiddle"], lambda: zero)
                    back = _WayBack(scratch["f1_back"], scratch["f2_back"], scratch["twiddle"], lambda: zero)
                    block.await_rows("u")

                    def fetch_next():
                        plgpu.commit_smem()  # the whole warpgroup has read its rows
                        fetch_rows(step + 1)

                    spectra = there.forward(tiles, then=fetch_next)
                    taps = complex_planes(scratch["spectrum"].at[slot], zero)
                    ys = back.inverse([conj_times(z, taps, dtype) for z in spectra], staging)
                    plgpu.commit_smem()  # the whole warpgroup has read what the results replace
                    for e, y in zip(staging, ys, strict=True):
                        e[0] = y.astype(dtype)
                    plgpu.commit_smem()
                    block.store([e.at[0] for e in staging], lambda b: out.at[b, 0, item // schedule.splits], row)

                @pl.when(jnp.logical_not(work))
                def _():
                    fetch_rows(step + 1)

        plgpu.wait_smem_to_gmem(0)

    scratch = scratch_types(config, shapes, ["u"], 1)
    scratch["barriers"]["tables"] = plgpu.Barrier(num_arrivals=2 * len(Tables._fields))
    scratch["f1"] = scratch["f1_back"] = matrices((2, N1, N1), dtype, columns=n2)
    scratch["f2"] = scratch["f2_back"] = matrices((2, n2, 2 * n2), dtype, columns=n2)
    out = jax.ShapeDtypeStruct((shapes.batch, 1, shapes.features, shapes.length, n2), dtype)
    return persistent_kernel(learned_fft_conv_forward, out, scratch, schedule.grid, config.warpgroups)


def shared_memory(config: Config) -> int:
    """Bytes of a block's matrices in shared memory.

    Example:
      >>> [shared_memory(default_config(n2)) for n2 in (16, 32, 64)]
      [147456, 147456, 229376]
    """
    n2 = config.n2
    blocks = 2 * (2 * N1 * N1 + 2 * n2 * 2 * n2)
    spectra = (1 + config.spectrum_slots) * 2 * N1 * n2  # and the twiddle
    return 2 * (blocks + spectra + config.warpgroups * 3 * N1 * TILE)
