"""The convolution of sequences of two to eight blocks of 4096 steps whose spectra meet on chip, by few launches.

Sequences and gates are `(B, 1 or C, D, rows, 64)`, spectra of the taps `(D, C, lags, 2, 64, 64)`, of more than four
blocks `fragments` in place of the two planes; the tables come last.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.fft_conv import (
    block_toeplitz,
    blocked_backward_sm90,
    blocked_sm90,
    streamed_gradient_sm90,
    streamed_sm90,
)
from pallas_kernels.fft_conv.config import MAX_BLOCKS
from pallas_kernels.fft_conv.lowering import lowered_once
from pallas_kernels.fft_conv.rearranged import from_fragments
from pallas_kernels.fft_conv.tables import convolution_tables


def forward(x, pre_gate, post_gate, spectra, lags: tuple[int, int], *tables):
    """The convolution `(B, C, D, rows, 64)` of x with taps of those lags; what takes several launches is summed."""
    shapes = _shapes(x, pre_gate, post_gate, spectra, lags)
    operands = x, *_present(x, pre_gate, post_gate)
    if shapes.count > MAX_BLOCKS:
        kernel = lowered_once(streamed_sm90.forward, shapes)
        return kernel(*operands, spectra, *streamed_sm90.tables(x.dtype, *tables))
    tables = _in_dtype(x.dtype, *tables)
    results = []
    for first in range(lags[0], lags[1] + 1, shapes.most_lags):
        some = first, min(first + shapes.most_lags - 1, lags[1])
        these = spectra[:, :, some[0] - lags[0] : some[1] - lags[0] + 1]
        kernel = lowered_once(blocked_sm90.forward, dataclasses.replace(shapes, lags=some))
        results.append(kernel(*operands, these, *tables))
    if len(results) == 1:
        return results[0]
    return sum(result.astype(jnp.float32) for result in results).astype(x.dtype)


def backward(x, pre_gate, post_gate, g, spectra, lags: tuple[int, int], *tables):
    """Cotangents: of pre x, a share for each channel; of a post gate, or None; of the spectra, in parts.

    Where the backward kernel has no room for the first, that is a convolution of its own, with the conjugate spectra at
    the opposite lags. More than four blocks are taken without gates.
    """
    shapes = _shapes(x, pre_gate, post_gate, spectra, lags)
    if shapes.count > MAX_BLOCKS:
        tables = streamed_sm90.tables(x.dtype, *tables)
        d_x, hs = lowered_once(streamed_sm90.adjoint, shapes)(g, spectra, *tables)
        xs = lowered_once(streamed_gradient_sm90.transform, shapes)(x, *tables)
        d_spectra = lowered_once(streamed_gradient_sm90.taps_gradient, shapes)(xs, hs)
        return d_x, None, jnp.stack(from_fragments(d_spectra.sum(0, keepdims=True)), -3)
    operands = x, g, *_present(x, pre_gate, post_gate)
    kernel = lowered_once(blocked_backward_sm90.backward, shapes)
    if shapes.dx_fits:
        d_x, d_spectra = kernel(*operands, spectra, *_in_dtype(x.dtype, *tables))
    else:
        (d_spectra,) = kernel(*operands, *_in_dtype(x.dtype, *tables))
        backwards = jnp.flip(spectra, 2)
        adjoint = jnp.stack([backwards[..., 0, :, :], -backwards[..., 1, :, :]], -3)
        d_x = forward(g, post_gate, None, adjoint, (-lags[1], -lags[0]), *tables)
    d_post = None if post_gate is None else forward(x, pre_gate, g, spectra, lags, *tables)
    return d_x, d_post, blocked_backward_sm90.whole_spectra(d_spectra, shapes)


def _shapes(x, pre_gate, post_gate, spectra, lags):
    batch, sequences, features, length, _ = x.shape
    gates = (0 if gate is None else gate.shape[1] for gate in (pre_gate, post_gate))
    return block_toeplitz.Shapes(batch, spectra.shape[1], features, length, lags, x.dtype, sequences, *gates)


def _present(x, pre_gate, post_gate):
    """The gates, with x in the place of an absent one."""
    return x if pre_gate is None else pre_gate, x if post_gate is None else post_gate


def _in_dtype(dtype, f1, f2, twiddle, shift):
    """The tables as these kernels take them, which transpose F1 as they read it."""
    f1, f2, twiddle = (table.astype(dtype) for table in convolution_tables(f1, f2, twiddle))
    return f1[:2], f2, twiddle, shift
