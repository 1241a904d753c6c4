"""The backward kernels with learned blocks: cotangents of the sequences, of the taps' spectrum and of every block.

There are twiddles T, blocks F1, F2 on the way there and V2, V1 on the way back. A row s is transformed by two blocks,

    B = T * M s,      S = B N,      (M, N) = (F1, F2) for s = u,   (V1^H, V2^H) for s = g, the cotangent of y

and the loss changes with y as Re sum conj(G) * K * U, of the spectra U, G and K, which knows no direction: the
cotangent of U is conj(K) * G, that of G is K * U and that of K, summed over the batch, conj(U) * G. So one kernel
serves both sequences. It calls `own` the one whose transform it derives and `other` the one whose spectrum O makes C:

    C = conj(K) * O  or  K * O          dN = sum B^H C
    A = conj(T) * (C N^H)               dM = sum A s^T          ds = Re M^H A          dK = sum conj(O) * S

Sums over rows stay in registers, and each warpgroup writes its own when it is done. With both sequences in one launch
they would be 208 or 224 of a thread's 255 registers at n2 = 16 and 32, and a tile's chain takes some 110. So one launch
is for u, with its cotangent, and one for g, with that of K, as it has S: 96 registers each, or 112 and 128. At n2 = 64
a pair of warpgroups has them in one launch (`learned_paired_sm90`).

What a tile of 64 x 64 complex points takes, in products of real 64 x 64 matrices, at n2 = 16 and 32:

    u: O, B and C N^H 6, 8     dM 2     dN 2, 2     ds 2       in all 12, 14
    g: O, B and C N^H 6, 8     dM 2     dN 2, 2     S 1, 2     in all 11, 14

where the fixed backward kernel takes 9 and 12 with a dense second block and either forward kernel 6 and 8: forward and
backward 29 and 36 to 15 and 20. From memory come u and g twice, and du goes there: 5 sequences to the fixed kernel's 3.

dN sums over k1, the rows of a tile, so both factors come from shared memory, the left one transposed; the tensor cores
want 64 of its columns, which are both parts of two rows (n2 = 16, whose products with each other are not read) or of
one. The other sums take their left factor from the registers that it was made in.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.chain import Butterfly, correlate, floats, opaque_zeros
from pallas_kernels.fft_conv.config import N1, TILE, Config
from pallas_kernels.fft_conv.mosaic import (
    CHUNK,
    F32,
    add_products,
    by_columns,
    complex_planes,
    matrices,
    persistent_kernel,
    sums_of_products,
)
from pallas_kernels.fft_conv.tiles import Block, Schedule, Shapes, barriers


def tables(derives_u: bool) -> tuple[str, ...]:
    """Names of those that a launch takes, in order: M and N of both sequences, N^H of its own on the way back.

    Example:
      >>> tables(True)
      ('other_first', 'other_second', 'own_first', 'own_back', 'twiddle')
    """
    ways = ("own_back",) if derives_u else ("own_back", "own_second")
    return "other_first", "other_second", "own_first", *ways, "twiddle"


def default_config(n2: int, warpgroups: int | None = None) -> Config:
    """Two warpgroups, of 255 registers each, and a second slot for spectra; n2 is 16 or 32.

    Example:
      >>> default_config(16)
      Config(n2=16, warpgroups=2, spectrum_slots=2, blocks=132)
    """
    return Config(n2, warpgroups or 2, 2)


def _by_conjugate(dtype, a, b, c, d):
    """(a + ib) times the conjugate of c + id."""
    a, b, c, d = floats(a, b, c, d)
    return (a * c + b * d).astype(dtype), (b * c - a * d).astype(dtype)


def _by(dtype, a, b, c, d):
    """(a + ib) (c + id)."""
    a, b, c, d = floats(a, b, c, d)
    return (a * c - b * d).astype(dtype), (a * d + b * c).astype(dtype)


def _side_by_side(parts):
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, 1)


def backward(config: Config, shapes: Shapes, derives_u: bool):
    """The kernel (other, own, spectrum, [31], *tables) -> (dM, dN, ds), or (dM, dN, dK) where own is g.

    other, own and ds are `(B, D, length, n2)`, the spectrum of the taps `(D, 2, 64, n2)`. The other results are partial
    sums in float32: dM `(parts, re | im, 64, 64)`; dN as `second_cotangent` takes it; dK `(parts, D, 2, 64, n2)`.

    The tables, in the dtype of the sequences: first blocks `(re | im, 64, 64)` and second ones in real form,
    `(2, n2, re | im k2)`, the twiddle `(re | im, 64, n2)`. n2 is 16 or 32.
    """
    dtype, n2, groups = shapes.dtype, config.n2, config.warpgroups
    names = tables(derives_u)
    schedule = Schedule(config, shapes.batch, shapes.features)
    partial_tiles = shapes.batch % config.rows != 0

    if derives_u:
        last = jax.ShapeDtypeStruct((shapes.batch, shapes.features, shapes.length, n2), dtype)
    else:
        last = jax.ShapeDtypeStruct((schedule.splits * groups, shapes.features, 2, N1, n2), F32)
    parts = (jax.ShapeDtypeStruct((schedule.grid * groups, planes, N1, N1), F32) for planes in (2, 1))

    def learned_fft_conv_backward(other, own, spectrum, shift, *refs, scratch):
        blocks, (d_first, d_second, d_last) = refs[: len(names)], refs[len(names) :]
        block = Block(schedule, shapes, ["other", "own"], scratch)
        shift_by = shift[0]
        block.clear("other", "own")

        def fetch(step, name, source):
            item, row, work = schedule.at(step)

            @pl.when(work)
            def _():
                block.fetch(source, lambda b: (b, item // schedule.splits), row, name)

        fetch(jnp.int32(0), "own", own)
        fetch(jnp.int32(0), "other", other)
        for ahead in range(config.spectrum_slots - 1):
            block.fetch_spectrum(spectrum, lax.axis_index("block") + ahead * schedule.grid)

        @pl.when(block.group == 0)
        def _():
            for name, table in zip(names, blocks, strict=True):
                for plane in (0, 1):
                    plgpu.copy_gmem_to_smem(table.at[plane], scratch[name].at[plane], block.barriers["tables"])

        plgpu.barrier_wait(block.barriers["tables"])

        def tile(step, slot, totals):
            first, second, dk = totals
            zero = opaque_zeros(step, shift_by)

            def rows(name):
                return block.tile(name, block.group + zero())

            def planes(name):
                return complex_planes(scratch[name].at[block.group + zero()], 0)

            def chain(first_name, second_name):
                now = zero()
                return Butterfly(scratch[first_name], scratch[second_name], scratch["twiddle"], lambda: now)

            def counts(r):
                """Whether the batch does not end before a row of the tile: C is zero for one beyond it."""
                return schedule.at(step + zero())[1] + r < shapes.batch

            def cotangent_of_u(r):
                """Function for C where it is that of u: a branch, as for g, would need more registers."""
                if r == 0 or not partial_tiles:
                    return functools.partial(_by_conjugate, dtype)
                one = jnp.where(counts(r), 1.0, 0.0).astype(dtype)
                return lambda *parts: tuple(part * one for part in _by_conjugate(dtype, *parts))

            def by_twiddle(function, tiles):
                return [by_columns(function, *z, *complex_planes(scratch["twiddle"], zero())) for z in tiles]

            def save(name, tiles):
                """Both parts of all rows side by side, in two matrices of 64 columns."""
                parts = [part for z in tiles for part in z]
                half = len(parts) // 2
                for ref, some in zip(planes(name), (parts[:half], parts[half:]), strict=True):
                    ref[...] = _side_by_side(some)

            block.await_rows("own")
            f = chain("own_first", "own_back").first_block()
            sums = sums_of_products(*([(part, s)] for s in rows("own") for part in f))
            bs = by_twiddle(functools.partial(_by, dtype), zip(sums[::2], sums[1::2], strict=True))
            save("held", bs)
            if not derives_u:  # registers are short while O is made
                for z, kept in zip(chain("own_first", "own_second").right(bs), rows("kept"), strict=True):
                    kept[0], kept[1] = (part.astype(dtype) for part in z)

            def fetch_other():
                plgpu.commit_smem()  # the whole warpgroup has read the last one
                fetch(step + 1 + zero(), "other", other)

            block.await_rows("other")
            spectra = chain("other_first", "other_second").forward(rows("other"), then=fetch_other)
            cs = []
            for r, z in enumerate(spectra):
                taps = complex_planes(scratch["spectrum"].at[slot], zero())
                if derives_u:
                    cs.append(by_columns(cotangent_of_u(r), *z, *taps))
                    continue
                kept = complex_planes(rows("kept")[r], 0)

                def counted(dk, z=z, taps=taps, kept=kept):
                    dk = by_columns(correlate, *z, *kept, *dk)
                    return dk, by_columns(functools.partial(_by, dtype), *z, *taps)

                def beyond(dk):
                    zeros = plgpu.layout_cast(jnp.zeros((N1, n2), dtype), plgpu.Layout.WGMMA)
                    return dk, (zeros, zeros)

                # A branch, though the first row always counts: ptxas would put these sums off, as in `kernel_sm90`.
                dk, c = lax.cond(counts(r), counted, beyond, dk)
                cs.append(c)
            save("cotangent", cs)
            plgpu.commit_smem()

            a_s = by_twiddle(functools.partial(_by_conjugate, dtype), chain("own_first", "own_back").right(cs))
            sequences = rows("own")
            first = add_products(first, *([(z[p], s.T) for z, s in zip(a_s, sequences, strict=True)] for p in (0, 1)))
            pairs = zip(planes("held"), planes("cotangent"), strict=True)
            second = add_products(second, [(b.T, c) for b, c in pairs])
            plgpu.commit_smem()  # the whole warpgroup has read its rows, B and C
            fetch(step + 1 + zero(), "own", own)
            if derives_u:
                save("held", [tuple(_side_by_side(part) for part in zip(*a_s, strict=True))])
                plgpu.commit_smem()
                of_own = complex_planes(scratch["own_first"], zero())
                (ds,) = sums_of_products([(m.T, a) for m, a in zip(of_own, planes("held"), strict=True)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staging = rows("staging")
                for r, place in enumerate(staging):
                    place[...] = ds[:, r * n2 : (r + 1) * n2].astype(dtype)
                plgpu.commit_smem()
                item, row, _ = schedule.at(step + zero())
                block.store(staging, lambda b: d_last.at[b, item // schedule.splits], row)
            return tuple(first), tuple(second), dk

        def nothing(count, columns):
            return (plgpu.layout_cast(jnp.zeros((N1, columns), F32), plgpu.Layout.WGMMA),) * count

        def visit(visit, totals):
            this = lax.axis_index("block") + visit * schedule.grid
            slot = block.begin_item(spectrum, this)

            def turn(turn, totals):
                step = visit * schedule.rounds + turn

                def rest(totals):
                    fetch(step + 1, "own", own)
                    fetch(step + 1, "other", other)
                    return totals

                return lax.cond(schedule.at(step)[-1], lambda totals: tile(step, slot, totals), rest, totals)

            *totals, dk = lax.fori_loop(0, schedule.rounds, turn, (*totals, nothing(0 if derives_u else 2, n2)))

            if not derives_u:

                @pl.when(this < schedule.items)
                def _():
                    part = lax.rem(this, schedule.splits) * groups + block.group
                    for plane in (0, 1):
                        d_last[part, this // schedule.splits, plane] = dk[plane]

            return tuple(totals)

        totals = lax.fori_loop(0, schedule.visits, visit, (nothing(2, N1), nothing(1, N1)))
        part = lax.axis_index("block") * groups + block.group
        for out, sums in zip((d_first, d_second), totals, strict=True):
            for plane, total in enumerate(sums):
                out[part, plane] = total
        plgpu.wait_smem_to_gmem(0)

    return persistent_kernel(
        learned_fft_conv_backward, (*parts, last), _scratch(config, shapes, derives_u), schedule.grid, groups
    )


def _scratch(config: Config, shapes: Shapes, derives_u: bool):
    n2, groups, dtype = config.n2, config.warpgroups, shapes.dtype
    names = tables(derives_u)
    rows = matrices((groups, config.rows, N1, n2), dtype)
    scratch = {"other": rows, "own": rows, "twiddle": matrices((2, N1, n2), dtype, columns=CHUNK)}
    for name in names[:-1]:
        first = name.endswith("first")
        scratch[name] = matrices((2, N1, N1), dtype) if first else matrices((2, n2, 2 * n2), dtype, columns=n2)
    scratch["spectrum"] = matrices((config.spectrum_slots, 2, N1, n2), dtype, columns=CHUNK)
    scratch["held"] = scratch["cotangent"] = matrices((groups, 2, N1, TILE), dtype)
    if derives_u:
        scratch["staging"] = rows
    else:
        scratch["kept"] = matrices((groups, config.rows, 2, N1, n2), dtype, columns=CHUNK)
    scratch["barriers"] = barriers(config, shapes, rows=2, planes=2, tables=2 * len(names))
    return scratch


def second_cotangent(parts: jax.Array, n2: int) -> jax.Array:
    """dN, `(re | im, n2, k2)`, from sums over tiles, `(parts, 1, 64, 64)`."""
    count = TILE // n2 // 2
    by_part = parts.sum((0, 1)).reshape(count, 2, n2, count, 2, n2)
    of_one_row = jnp.einsum("ipnjqk,ij->pqnk", by_part, jnp.eye(count), precision="highest")
    return jnp.stack([of_one_row[0, 0] + of_one_row[1, 1], of_one_row[0, 1] - of_one_row[1, 0]])


def shared_memory(config: Config, derives_u: bool) -> int:
    """Bytes of a block's matrices in shared memory.

    Example:
      >>> [[shared_memory(default_config(n2), of_u) for of_u in (True, False)] for n2 in (16, 32)]
      [[163840, 182272], [188416, 212992]]
    """
    n2, tile = config.n2, N1 * TILE
    seconds = len(tables(derives_u)) - 3  # without the first blocks and the twiddle
    matrices_of_tables = 2 * 2 * tile + seconds * 4 * n2 * n2 + 2 * N1 * n2
    spectra = config.spectrum_slots * 2 * N1 * n2
    tiles = 6 + (1 if derives_u else 2)
    return 2 * (matrices_of_tables + spectra + config.warpgroups * tiles * tile)
