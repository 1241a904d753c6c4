"""The convolution of sequences that no block holds: outer stage, many short convolutions, the mirrored outer stage.

`outer_plan` has the algebra. Each pass reads and writes memory once: with 16-bit numbers a step of a sequence is 2
bytes and one of its transform 4, so that forward takes 6 + 8 + 6 bytes a step, five times what a single pass would, and
backward 6 + 6 + 12 + 6. Sequences come and go as `(B, 1 or C, D, blocks, 4096)`; within, they are the plan's rows.
"""

import jax.numpy as jnp

from pallas_kernels.fft_conv import (
    inner_rows,
    inner_sm90,
    inner_transform_sm90,
    outer_panels,
    outer_radix4_sm90,
    outer_radix_sm90,
    outer_sm90,
)
from pallas_kernels.fft_conv.config import BLOCK, N1, TILE
from pallas_kernels.fft_conv.lowering import lowered_once
from pallas_kernels.fft_conv.outer_plan import (
    OuterPlan,
    inner_tables,
    radix_roots,
    radix_tables,
    real_product_tables,
    spectrum_scale,
    stage_matrix,
)
from pallas_kernels.fft_conv.platform import varying_alike
from pallas_kernels.fft_conv.reference import gated


def forward(x, pre_gate, post_gate, taps, plan: OuterPlan, shift, *, before: bool):
    """The convolution `(B, C, D, blocks, 4096)` of x.

    Args:
      x: `(B, 1, D, blocks, 4096)`.
      pre_gate: None, or like x.
      post_gate: None, or `(B, 1 or C, D, blocks, 4096)`.
      taps: `(D, C, blocks, 4096)` in float32, see `tap_spectra`.
      plan: for at least so many steps.
      shift: `[31]`, by which the kernels make their opaque zeros.
      before: whether half of the taps lies before lag 0.
    """
    x, pre_gate, post_gate = _in_rows(plan, x, pre_gate, post_gate)
    spectra = tap_spectra(taps, plan, x.dtype, shift, before=before)
    return _in_blocks(_convolve(_split(x, pre_gate, plan), post_gate, spectra, plan, x.shape[-2], shift))


def backward(x, pre_gate, post_gate, g, taps, plan: OuterPlan, shift, *, before: bool):
    """Cotangents: of pre x, a share for each channel `(B, C, D, blocks, 4096)`; of a post gate, or None; of the taps.

    `forward` says what the arguments are; g, the cotangent of the result, is `(B, C, D, blocks, 4096)`.
    """
    x, pre_gate, post_gate, g = _in_rows(plan, x, pre_gate, post_gate, g)
    spectra = tap_spectra(taps, plan, x.dtype, shift, before=before)
    z, h = _split(x, pre_gate, plan), _split(g, post_gate, plan)
    shapes = _inner_shapes(z, spectra, plan, warpgroups=2)  # as many as have registers
    kernel = lowered_once(inner_sm90.backward, shapes)
    matrices = (_as_matrices(rows, plan.row_width) for rows in (z, h))
    w, d_spectra = kernel(*matrices, spectra, *inner_tables(plan, x.dtype), shift)
    d_x = _join(w, None, plan, x.shape[-2])
    d_post = None if post_gate is None else _convolve(z, g, spectra, plan, x.shape[-2], shift)
    d_taps = tap_cotangent(d_spectra.sum(0), taps.shape[2], plan, shift, before=before)
    d_post = None if d_post is None else _in_blocks(d_post)
    return _in_blocks(d_x), d_post, varying_alike(taps, d_taps)[1]


def tap_spectra(taps, plan: OuterPlan, dtype, shift, *, before: bool):
    """The taps' spectra in the order of the rows of Z, `(D, C, m, *Shapes.spectrum)`.

    As planes they are in the dtype, in the order of threads in float32.

    The taps go through the stages of a sequence, in float16: `jnp.fft` and a change of its order took 8 % of the whole
    convolution of 65,536 steps at a batch of 64 on an H100.

    Args:
      taps: `(D, C, blocks, 4096)` in float32, blocks of lags from 0, or as many from before it as from then on.
      plan: whose order and scale the spectra take.
      dtype: bfloat16 or float16.
      shift: `[31]`, see `forward`.
      before: whether the first half of the blocks lies before lag 0. A step earlier than the first is n later with a
        factor i, as in `tables.tap_spectra`.
    """
    (taps,) = _in_rows(plan, taps)
    half = taps.shape[2] // 2 if before else 0
    rows, size = _normalized(taps.reshape(-1, 1, 1, *taps.shape[2:]))
    z = _split(_placed(rows[..., half:, :], 0), None, plan)
    if before:
        z = _plus_i_times(z, _split(_placed(rows[..., :half, :], plan.rows - half), None, plan), plan)
    kernel = lowered_once(inner_transform_sm90.forward, _taps_shapes(z, plan), dtype)
    spectra = kernel(_as_matrices(z, plan.row_width), size * spectrum_scale(plan), *inner_tables(plan, z.dtype), shift)
    return spectra.reshape(*taps.shape[:2], *spectra.shape[1:])


def tap_cotangent(d_spectra, blocks: int, plan: OuterPlan, shift, *, before: bool):
    """The cotangent `(D, C, blocks, 4096)` of the taps whose spectra have this one, as `inner_sm90.backward` makes it.

    Its error is 4.6e-4 of the norm of a channel's whole cotangent, like those of the 16-bit transforms before it.
    """
    count = blocks * BLOCK // plan.steps
    half = count // 2 if before else 0
    planes = d_spectra.reshape(-1, 1, 1, *d_spectra.shape[2:]).swapaxes(3, 4)
    rows, size = _normalized(planes.reshape(*planes.shape[:3], -1, N1, plan.row_width))
    kernel = lowered_once(inner_transform_sm90.inverse, _taps_shapes(rows, plan))
    w = kernel(rows, *inner_tables(plan, rows.dtype), shift)
    w = w.reshape(*w.shape[:3], 2 * plan.rows, plan.steps)

    def lags(w, first, count):
        return _join(w, None, plan, 8 * -(-(first + count) // 8))[..., first : first + count, :]

    d_taps = lags(w, 0, count - half)
    if before:
        re, im = _parts(w, plan)
        d_taps = jnp.concatenate([lags(_of_parts(im, -re, plan), plan.rows - half, half), d_taps], 3)
    size = size[:, None, None, None, None] * spectrum_scale(plan)
    return (d_taps.astype(jnp.float32) * size).reshape(*d_spectra.shape[:2], blocks, BLOCK)


def _normalized(x):
    """Each of a batch in float16, divided by a power of two, so that its largest number is below 1; and the powers."""
    _, exponents = jnp.frexp(jnp.abs(x).max(tuple(range(1, x.ndim)), keepdims=True))
    size = jnp.ldexp(1.0, jnp.clip(exponents, -126, 127)).astype(jnp.float32)
    return (x / size).astype(jnp.float16), size.reshape(-1)


def _placed(rows, first: int):
    """The rows from row `first` on, among zeros, as many as whole tiles have."""
    count = first + rows.shape[-2]
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(first, -count % 8), (0, 0)])


def _plus_i_times(z, ahead, plan):
    """Of two Z's, in the layout of one: z + i ahead."""
    (re, im), (ahead_re, ahead_im) = (_parts(x.astype(jnp.float32), plan) for x in (z, ahead))
    return _of_parts(re - ahead_im, im + ahead_re, plan).astype(z.dtype)


def _parts(z, plan):
    """Real and imaginary part `(..., m, steps)` of Z, `(..., 2 m, steps)`."""
    if plan.paired:
        pairs = z.reshape(*z.shape[:-2], plan.rows, 2, plan.steps)
        return pairs[..., 0, :], pairs[..., 1, :]
    return jnp.split(z, 2, -2)


def _of_parts(re, im, plan):
    """Z of its parts."""
    return jnp.stack([re, im], -2 if plan.paired else -3).reshape(*re.shape[:-2], 2 * plan.rows, plan.steps)


def _taps_shapes(z, plan):
    tile = {"height": plan.row_height, "width": plan.row_width, "warpgroups": warpgroups(plan)}
    return inner_rows.Shapes(z.shape[0], 1, 1, plan.rows, z.dtype, **tile)


def warpgroups(plan: OuterPlan) -> int:
    """Of an inner kernel's block on the way there, as many as have registers."""
    return 4 if plan.row_width == TILE else 2


def _convolve(z, post_gate, spectra, plan, rows, shift):
    shapes = _inner_shapes(z, spectra, plan, warpgroups=warpgroups(plan))
    kernel = lowered_once(inner_sm90.forward, shapes)
    w = kernel(_as_matrices(z, plan.row_width), spectra, *inner_tables(plan, z.dtype), shift)
    return _join(w, post_gate, plan, rows)


def _in_rows(plan, *sequences):
    """Sequences in blocks, or none, in the plan's rows."""
    return [x if x is None else x.reshape(*x.shape[:-2], -1, plan.steps) for x in sequences]


def _in_blocks(x):
    return x.reshape(*x.shape[:-2], -1, BLOCK)


def _as_matrices(z, width: int = TILE):
    """Z, `(..., 2 m, steps)`, as the inner kernels take it: `inner_rows.Shapes.result`."""
    return z.reshape(*z.shape[:-2], -1, N1, width)


def _inner_shapes(z, spectra, plan, **options):
    batch, sequences, features, _, _ = z.shape
    _, channels, rows = spectra.shape[:3]
    tile = {"height": plan.row_height, "width": plan.row_width, "together": 1 + plan.paired}
    return inner_rows.Shapes(batch, channels, features, rows, z.dtype, sequences, **tile, **options)


def _split(x, gate, plan: OuterPlan):
    """Z, `(B, 1 or C, D, 2 m, steps)`, of gate x."""
    batch, sequences, features, rows, _ = x.shape
    if plan.radix > 1:
        return _radix_stage("split", gated(x, gate), plan, rows)
    gates = 0 if gate is None else gate.shape[1]
    shapes = outer_sm90.Shapes(
        batch, max(sequences, gates), features, rows, 2 * plan.rows, x.dtype, sequences, gates, True, plan.steps // TILE
    )
    return _stage(shapes, x, gate, stage_matrix(plan)[:, :rows])  # fewer than m, or more, which are zeros


def _join(w, gate, plan: OuterPlan, rows: int):
    """The real result `(B, C, D, rows, steps)`, times the gate."""
    w = w.reshape(*w.shape[:3], 2 * plan.rows, plan.steps)
    if plan.radix > 1:
        return gated(_radix_stage("join", w, plan, rows), gate)
    batch, channels, features, _, _ = w.shape
    gates = 0 if gate is None else gate.shape[1]
    shapes = outer_sm90.Shapes(
        batch, channels, features, 2 * plan.rows, rows, w.dtype, channels, gates, panels=plan.steps // TILE
    )
    return _stage(shapes, w, gate, stage_matrix(plan).T[:rows])


def _stage(shapes, x, gate, matrix):
    x, gate = (part if part is None else part.reshape(*part.shape[:-1], -1, TILE) for part in (x, gate))
    result = lowered_once(outer_sm90.stage, shapes)(x, x if gate is None else gate, shapes.stacked(matrix))
    return result.reshape(*result.shape[:4], -1)


def _radix_stage(way: str, x, plan: OuterPlan, rows: int):
    """`split` or `join` of more rows than one product takes; the kernels have no room for a gate."""
    flat = x.reshape(-1, *x.shape[-2:])
    if way == "join" and plan.paired:
        flat = flat.reshape(len(flat), plan.rows, 2 * BLOCK)
    if plan.real_products:
        return _real_product_stage(way, flat, plan, rows).reshape(*x.shape[:3], -1, BLOCK)
    shapes = outer_panels.Shapes(flat.shape[0], rows, plan, x.dtype)
    f, factors = radix_tables(plan)
    kernel = lowered_once(getattr(outer_radix_sm90, way), shapes)
    return kernel(flat, f.astype(x.dtype), factors, radix_roots(plan)).reshape(*x.shape[:3], -1, BLOCK)


def _real_product_stage(way: str, flat, plan: OuterPlan, rows: int):
    """The same with products of real rows, of which four side by side are in tiles of 8: others are padded."""
    side_by_side = outer_radix4_sm90.RADIX
    padded = 8 * side_by_side * -(-rows // (8 * side_by_side))
    if way == "split":
        flat = jnp.pad(flat, ((0, 0), (0, padded - rows), (0, 0)))
        flat = flat.reshape(len(flat), padded // side_by_side, side_by_side * BLOCK)
    shapes = outer_panels.Shapes(len(flat), padded, plan, flat.dtype)
    f, factors = real_product_tables(plan)
    result = lowered_once(getattr(outer_radix4_sm90, way), shapes)(flat, f.astype(flat.dtype), factors)
    return result if way == "split" else result.reshape(len(flat), padded, BLOCK)[:, :rows]
