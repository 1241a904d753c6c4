"""The convolution of sequences that no block holds: outer stage, many short convolutions, the mirrored outer stage.

`outer_plan` has the algebra. Each pass reads and writes memory once: with 16-bit numbers a step of a sequence is 2
bytes and one of its transform 4, so that forward takes 6 + 8 + 6 bytes a step, five times what a single pass would, and
backward 6 + 6 + 12 + 6. Sequences are `(B, 1 or C, D, rows, 4096)` here.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv import inner_sm90, outer_radix_sm90, outer_sm90
from pallas_kernels.fft_conv.config import BLOCK, N1, TILE
from pallas_kernels.fft_conv.outer_plan import (
    OuterPlan,
    inner_tables,
    outer_spectra,
    radix_roots,
    radix_tables,
    split_matrix,
)
from pallas_kernels.fft_conv.platform import varying_alike
from pallas_kernels.fft_conv.reference import gated


def forward(x, pre_gate, post_gate, taps, plan: OuterPlan, shift, *, before: bool):
    """The convolution `(B, C, D, rows, 4096)` of x.

    Args:
      x: `(B, 1, D, rows, 4096)`.
      pre_gate: None, or like x.
      post_gate: None, or `(B, 1 or C, D, rows, 4096)`.
      taps: `(D, C, blocks, 4096)` in float32, see `outer_plan.outer_spectra`.
      plan: for at least so many rows.
      shift: `[31]`, by which the kernels make their opaque zeros.
      before: whether half of the taps lies before lag 0.
    """
    spectra = outer_spectra(taps, plan, before=before).astype(x.dtype)
    return _convolve(_split(x, pre_gate, plan), post_gate, spectra, plan, x.shape[-2], shift)


def backward(x, pre_gate, post_gate, g, taps, plan: OuterPlan, shift, *, before: bool):
    """Cotangents: of pre x, a share for each channel `(B, C, D, rows, 4096)`; of a post gate, or None; of the taps.

    `forward` says what the arguments are; g, the cotangent of the result, is `(B, C, D, rows, 4096)`.
    """
    spectra, transpose = jax.vjp(functools.partial(outer_spectra, plan=plan, before=before), taps)
    spectra = spectra.astype(x.dtype)
    z, h = _split(x, pre_gate, plan), _split(g, post_gate, plan)
    kernel = inner_sm90.backward(_inner_shapes(z, spectra, warpgroups=2))  # as many as have registers
    w, d_spectra = kernel(_as_matrices(z), _as_matrices(h), spectra, *_inner_operands(plan, x.dtype), shift)
    d_x = _join(w, None, plan, x.shape[-2])
    d_post = None if post_gate is None else _convolve(z, g, spectra, plan, x.shape[-2], shift)
    _, d_spectra = varying_alike(spectra, d_spectra)
    (d_taps,) = transpose(d_spectra.sum(0))
    return d_x, d_post, d_taps


def _convolve(z, post_gate, spectra, plan, rows, shift):
    kernel = inner_sm90.forward(_inner_shapes(z, spectra))
    return _join(kernel(_as_matrices(z), spectra, *_inner_operands(plan, z.dtype), shift), post_gate, plan, rows)


def _as_matrices(z):
    return z.reshape(*z.shape[:-1], N1, TILE)


def _inner_shapes(z, spectra, **options):
    batch, sequences, features, _, _ = z.shape
    _, channels, rows = spectra.shape[:3]
    return inner_sm90.Shapes(batch, channels, features, rows, z.dtype, sequences, **options)


def _inner_operands(plan, dtype):
    f1, f2, twiddle = inner_tables(plan, dtype)
    return f1, f2[None], twiddle


def _split(x, gate, plan: OuterPlan):
    """Z, `(B, 1 or C, D, re | im m, 4096)`, of gate x."""
    batch, sequences, features, rows, _ = x.shape
    if plan.radix > 1:
        return _radix_stage(outer_radix_sm90.split, gated(x, gate), plan, rows)
    gates = 0 if gate is None else gate.shape[1]
    shapes = outer_sm90.Shapes(
        batch, max(sequences, gates), features, rows, 2 * plan.rows, x.dtype, sequences, gates, gate_in=True
    )
    matrix = jnp.concatenate(split_matrix(plan))[:, :rows]  # fewer than m, or more, which are zeros
    return _stage(shapes, x, gate, matrix)


def _join(w, gate, plan: OuterPlan, rows: int):
    """The real result `(B, C, D, rows, 4096)`, times the gate."""
    w = w.reshape(*w.shape[:4], BLOCK)
    if plan.radix > 1:
        return gated(_radix_stage(outer_radix_sm90.join, w, plan, rows), gate)
    batch, channels, features, _, _ = w.shape
    gates = 0 if gate is None else gate.shape[1]
    shapes = outer_sm90.Shapes(batch, channels, features, 2 * plan.rows, rows, w.dtype, channels, gates)
    matrix = jnp.concatenate([part.T for part in split_matrix(plan)], 1)[:rows]
    return _stage(shapes, w, gate, matrix)


def _stage(shapes, x, gate, matrix):
    x, gate = (part if part is None else _as_matrices(part) for part in (x, gate))
    result = outer_sm90.stage(shapes)(x, x if gate is None else gate, shapes.stacked(matrix))
    return result.reshape(*result.shape[:4], BLOCK)


def _radix_stage(kernel, x, plan: OuterPlan, rows: int):
    """`split` or `join` of more rows than one product takes; the kernels have no room for a gate."""
    flat = x.reshape(-1, *x.shape[-2:])
    shapes = outer_radix_sm90.Shapes(flat.shape[0], rows, plan, x.dtype)
    f, factors = radix_tables(plan)
    roots = radix_roots(plan)
    result = kernel(shapes)(flat, f.astype(x.dtype), factors, roots)
    return result.reshape(*x.shape[:3], *result.shape[1:])
