"""Kernel bodies for Hopper: the right-angle butterfly convolution in one launch, through Mosaic GPU.

One row of a sequence is a 64 x n2 matrix X, its transform of n = 64 n2 complex points is two matrix products with an
elementwise twiddle between them, and the convolution is that chain, a product with the taps' spectrum K, and the chain
backwards (`tables` defines F1, F2 and T):

    A = F1 X                 left product, X real, from shared memory
    B = A * T                registers
    C = B F2                 right product, B straight from the registers
    D = conj(C * K)          registers
    G = D F2                 right product
    E = G * T                registers to shared memory: the one round trip of the intermediate
    Y = Re(F1)' Re(E) - Im(F1)' Im(E)      left product

From 32 columns on, the right products are taken by radix 2 or 4 in registers and then by blocks of 16 points
(`column_dft`), which leaves them half or a quarter of their work. Conjugating once, at D, lets the way back use the
forward tables: nothing is transposed or stored twice. Each warpgroup carries its own tile (64 x 64 complex points: one
row of 4096, two of 2048 or four of 1024 side by side) through the whole chain, so that while one waits for the tensor
cores the others do the elementwise work. Rows of a tile never mix, so a NaN stays in its row. A block is persistent: it
visits channels with the stride of the grid, and the tables stay.

`chain` has the products, `tiles` what is around them.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fft_conv.chain import (
    apply_gate,
    butterfly,
    conj_correlate,
    conj_times,
    correlate,
    opaque_zeros,
)
from pallas_kernels.fft_conv.config import N1, Config
from pallas_kernels.fft_conv.mosaic import CHUNK, F32, by_columns, complex_planes, load, matrices, persistent_kernel
from pallas_kernels.fft_conv.tiles import Block, Schedule, Shapes, scratch_types


def forward(config: Config, shapes: Shapes):
    """The kernel (u, pre gate or None, post gate or None, spectrum, f1, f2, twiddle, [31]) -> y.

    u is `(B, D, length, n2)`, the spectrum of the taps `(D, 2 C, 64, n2)`, y `(B, C, D, length, n2)`.
    """
    channels, dtype = shapes.channels, shapes.dtype
    schedule = Schedule(config, shapes.batch, shapes.features)
    names = ["u", *["gate"] * (shapes.pre_gate or shapes.post_gates > 0)]

    def fft_conv_forward(u, pre_gate, post_gate, spectrum, f1, f2, twiddle, shift, out, scratch):
        block = Block(schedule, shapes, names, scratch)
        kept_shift = shift[0]
        block.clear(*names)

        def shift_by():
            """Read again at each use where that alone leaves every tile's work without spilled registers."""
            return shift[0] if shapes.whole(config) else kept_shift

        def fetch_rows(step, source, name):
            item, row, work = schedule.at(step)

            @pl.when(work)
            def _():
                block.fetch(source, lambda b: (b, item // schedule.splits), row, name)

        def fetch_pre_gate(step):  # the two gates share a tile: the next row's comes after this row's post gate
            if shapes.pre_gate:
                fetch_rows(step, pre_gate, "gate")

        fetch_rows(jnp.int32(0), u, "u")
        fetch_pre_gate(jnp.int32(0))
        for ahead in range(config.spectrum_slots - 1):
            block.fetch_spectrum(spectrum, lax.axis_index("block") + ahead * schedule.grid)
        block.load_tables(f1, f2, twiddle)

        @pl.loop(0, schedule.visits)
        def _(visit):
            slot = block.begin_item(spectrum, lax.axis_index("block") + visit * schedule.grid)

            @pl.loop(0, schedule.rounds)
            def _(turn):
                step = visit * schedule.rounds + turn
                item, row, work = schedule.at(step)
                feature = item // schedule.splits

                @pl.when(work)
                def _():
                    def same_zero(number):
                        zero = lax.shift_right_logical(number, shift_by())
                        return lambda: zero

                    def tile(name, fresh):
                        return block.tile(name, block.group + fresh())

                    fresh = same_zero(step)
                    block.await_rows("u")
                    if shapes.pre_gate:
                        block.await_rows("gate")
                        for x, gate in zip(tile("u", fresh), tile("gate", fresh), strict=True):
                            x[...] = apply_gate(load(x), load(gate), dtype)
                        plgpu.commit_smem()
                    chain = butterfly(config, scratch, fresh)

                    def fetch_next():
                        plgpu.commit_smem()  # the whole warpgroup has read its rows
                        fetch_rows(step + 1, u, "u")

                    spectra = chain.forward(tile("u", fresh), then=fetch_next)

                    def convolve(channel, spectra, fresh):
                        if shapes.post_gates:
                            gate = channel if shapes.post_gates > 1 else 0
                            block.fetch(post_gate, lambda b: (b, gate, feature), row, "gate")
                        taps = complex_planes(scratch["spectrum"].at[slot], 2 * channel + fresh())
                        products = [conj_times(z, taps, dtype) for z in spectra]
                        ys = butterfly(config, scratch, fresh).inverse(products, tile("staging", fresh))
                        if shapes.post_gates:
                            block.await_rows("gate")
                            ys = [
                                apply_gate(y, load(gate), dtype)
                                for y, gate in zip(ys, tile("gate", fresh), strict=True)
                            ]
                        staging = tile("staging", fresh)
                        plgpu.commit_smem()  # the whole warpgroup has read what the results replace
                        for e, y in zip(staging, ys, strict=True):
                            e[0] = y.astype(dtype)
                        plgpu.commit_smem()
                        block.store_plane(0, block.group + fresh(), lambda b: out.at[b, channel, feature], row)

                    if channels == 1:
                        # A gate's address takes registers too: with one, those of the tables are not kept.
                        convolve(0, spectra, same_zero(step + 1) if "gate" in names else fresh)
                        fetch_pre_gate(step + 1)
                        return
                    for z, kept in zip(spectra, tile("spectra", fresh), strict=True):
                        kept[0], kept[1] = (part.astype(dtype) for part in z)

                    @pl.loop(0, channels)
                    def _(channel):
                        fresh = same_zero(step + channel)
                        kept = [complex_planes(z, 0) for z in tile("spectra", fresh)]
                        convolve(channel, kept, fresh)

                    fetch_pre_gate(step + 1)

                @pl.when(jnp.logical_not(work))
                def _():
                    fetch_rows(step + 1, u, "u")
                    fetch_pre_gate(step + 1)

        plgpu.wait_smem_to_gmem(0)

    complex_tiles = (config.warpgroups, config.rows, 2, N1, config.n2)
    more = {"spectra": matrices(complex_tiles, dtype, columns=CHUNK)} if channels > 1 else {}
    # Rows that are copied one by one take registers, which F1 in blocks gives back; others would compile worse with it.
    scratch = scratch_types(config, shapes, names, channels, not shapes.whole(config), **more)
    out = jax.ShapeDtypeStruct((shapes.batch, channels, shapes.features, shapes.length, config.n2), dtype)
    return persistent_kernel(fft_conv_forward, out, scratch, schedule.grid, config.warpgroups)


def backward(config: Config, shapes: Shapes):
    """The kernel (u, pre gate or None, post gate or None, g, spectrum, f1, f2, twiddle, [31]) -> (du, ..., ds).

    It gives the cotangents of y = post (K * (pre u)) for that of y, g, `(B, C, D, length, n2)`. With x = pre u,
    h = post g and their spectra X and H, recomputed so that nothing but the arguments need be kept for it,

        dx = Re F^-1(conj(K) H),   du = pre dx,   dpre = u dx,   dpost = g Re F^-1(K X),   ds = sum_b conj(X) H

    in that order; the cotangent of a gate that is not there is left out. All but ds have the shape of g, each channel's
    share; ds is `(parts, D, 2 C, 64, n2)` in float32, to be summed over the parts that the warpgroups kept, each in its
    registers. An item is a feature and a channel.

    Each of the sequences has a tile in shared memory, which the next row's is copied to as soon as this row needs it no
    more: h takes the place of the post gate, x a plane of the staging.
    """
    channels, dtype, n2 = shapes.channels, shapes.dtype, config.n2
    pre, post = shapes.pre_gate, shapes.post_gates > 0
    schedule = Schedule(config, shapes.batch, shapes.features * channels)
    groups = config.warpgroups
    names = ["u", *["pre_gate"] * pre, *["post_gate"] * post, "g"]

    def fft_conv_backward(u, pre_gate, post_gate, g, spectrum, f1, f2, twiddle, shift, du, *more, scratch):
        *d_gates, ds = more
        sources = {"u": u, "pre_gate": pre_gate, "post_gate": post_gate, "g": g}
        block = Block(schedule, shapes, names, scratch)
        shift_by = shift[0]
        block.clear(*names)

        def place(item):
            spectra = item // schedule.splits
            return spectra // channels, lax.rem(spectra, channels)

        def fetch_rows(step, *names):
            item, row, work = schedule.at(step)
            feature, channel = place(item)

            def index(name):
                if name == "g":
                    return lambda b: (b, channel, feature)
                if name == "post_gate":
                    return lambda b: (b, channel if shapes.post_gates > 1 else 0, feature)
                return lambda b: (b, feature)

            @pl.when(work)
            def _():
                for name in names:
                    block.fetch(sources[name], index(name), row, name)

        fetch_rows(jnp.int32(0), *names)
        for ahead in range(config.spectrum_slots - 1):
            block.fetch_spectrum(spectrum, lax.axis_index("block") + ahead * schedule.grid)
        block.load_tables(f1, f2, twiddle)

        @pl.loop(0, schedule.visits)
        def _(visit):
            this = lax.axis_index("block") + visit * schedule.grid
            slot = block.begin_item(spectrum, this)

            def turn(turn, ds):
                step = visit * schedule.rounds + turn
                work = schedule.at(step)[-1]

                def tile(ds):
                    zero = opaque_zeros(step, shift_by)

                    def rows(name):
                        return block.tile(name, block.group + zero())

                    def staging(plane):
                        return [e.at[plane] for e in rows("staging")]

                    def chain():
                        now = zero()
                        return butterfly(config, scratch, lambda: now)

                    def taps():
                        return complex_planes(scratch["spectrum"].at[slot], zero())

                    def kept():
                        return [complex_planes(z, 0) for z in rows("spectra")]

                    def fetch_next(name):
                        fetch_rows(step + 1 + zero(), name)

                    def spectra(read, then_fetch=None):
                        """Of rows in shared memory, whose place the next ones may then take."""
                        results = chain().forward(read)
                        if then_fetch:
                            plgpu.commit_smem()  # the whole warpgroup has read them
                            fetch_next(then_fetch)
                        return results

                    def inverse(products):
                        results = chain().inverse(products, rows("staging"))
                        plgpu.commit_smem()  # the whole warpgroup has read what the results replace
                        return results

                    def gate(name, gate_name, products):
                        """Rounded as the forward kernel does."""
                        block.await_rows(name)
                        block.await_rows(gate_name)
                        for x, y, product in zip(rows(name), rows(gate_name), products, strict=True):
                            product[...] = apply_gate(load(x), load(y), dtype)
                        plgpu.commit_smem()
                        return products

                    def store(plane, results, target, factor=None):
                        """Starts the copy of results, times the rows of that name, through a plane of the staging."""
                        factors = map(load, rows(factor)) if factor else [None] * config.rows
                        for e, result, x in zip(staging(plane), results, factors, strict=True):
                            e[...] = result.astype(dtype) if x is None else apply_gate(result, x, dtype)
                        plgpu.commit_smem()
                        item, row, _ = schedule.at(step + zero())
                        feature, channel = place(item)
                        mine = block.group + zero()
                        block.store_plane(plane, mine, lambda b: target.at[b, channel, feature], row)

                    if pre:
                        if not post:  # or else the last result in this plane has left before the inverse of K X
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        xs = spectra(gate("u", "pre_gate", staging(1)))
                    else:
                        block.await_rows("u")
                        xs = spectra(rows("u"), "u")
                    for z, (re, im) in zip(xs, kept(), strict=True):  # registers are short while H is made
                        re[...], im[...] = (part.astype(dtype) for part in z)

                    if post:
                        hs = spectra(gate("g", "post_gate", rows("post_gate")), "post_gate")
                    else:
                        block.await_rows("g")
                        hs = spectra(rows("g"), "g")

                    products = []
                    for r, (z, w) in enumerate(zip(kept(), hs, strict=True)):
                        # A branch, though the first row always counts: ptxas would put these sums, which only the
                        # next tile needs, off to the end of this one and spill what it kept for them, up to 300 bytes.
                        counts = schedule.at(step + zero())[1] + r < shapes.batch
                        ds = lax.cond(
                            counts, lambda ds, z=z, w=w: by_columns(correlate, *z, *w, *ds), lambda ds: ds, ds
                        )
                        products.append(by_columns(functools.partial(conj_correlate, dtype), *taps(), *w))
                    dxs = inverse(products)
                    store(0, dxs, du, "pre_gate" if pre else None)
                    if pre:
                        store(1, dxs, d_gates[0], "u")
                        fetch_next("u")
                        fetch_next("pre_gate")

                    if post:
                        products = [conj_times(z, taps(), dtype) for z in kept()]
                        store(0, inverse(products), d_gates[-1], "g")
                        fetch_next("g")
                    return ds

                def rest(ds):
                    fetch_rows(step + 1, *names)
                    return ds

                return lax.cond(work, tile, rest, ds)

            nothing = plgpu.layout_cast(jnp.zeros((N1, n2), F32), plgpu.Layout.WGMMA)
            ds_re, ds_im = lax.fori_loop(0, schedule.rounds, turn, (nothing, nothing))

            @pl.when(this < schedule.items)
            def _():
                feature, channel = place(this)
                part = lax.rem(this, schedule.splits) * groups + block.group
                ds[part, feature, 2 * channel] = ds_re
                ds[part, feature, 2 * channel + 1] = ds_im

        plgpu.wait_smem_to_gmem(0)

    share = jax.ShapeDtypeStruct((shapes.batch, channels, shapes.features, shapes.length, n2), dtype)
    parts = jax.ShapeDtypeStruct((schedule.splits * groups, shapes.features, 2 * channels, N1, n2), F32)
    spectra = matrices((groups, config.rows, 2, N1, n2), dtype, columns=CHUNK)
    scratch = scratch_types(config, shapes, names, 1, spectra=spectra)
    out = (share,) * (1 + pre + post) + (parts,)
    return persistent_kernel(fft_conv_backward, out, scratch, schedule.grid, config.warpgroups)
