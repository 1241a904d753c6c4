"""Kernel bodies in Triton for tensor cores whose operands are in registers: compute capability 8.x and 12.0.

The algebra is that of `triton_plans`: a row of the sequence is an N1 x N2 matrix X, and a program carries ROWS rows of
the batch side by side through the whole chain,

    A = F1 X            (k1, r n2)      B = A * T
    C = B F2            (k1 r, k2)      D = conj(C * K)
    G = D F2            (k1 r, n2)      E = G * T
    Y' = Re(E)' Re(F1) - Im(E)' Im(F1)  (r n2, n1)

where (k1, r n2) and (k1 r, n2) are the same numbers in the same order, so that every product is a plain one of two
matrices. Conjugating once, at D, lets the way back use the forward tables. Rows of the batch meet in no product: a NaN
stays in its row.

What bounds a tile is registers: each warp holds its own copy of a product's right operand. So no right operand is ever
there as a whole. A sums over pieces of X and F1; a piece of the columns of C becomes one of D and a term of G at once;
and the columns of Y' leave piece by piece. A piece is CHUNK numbers wide.

Operands of products have the dtype of the tables, sums and everything elementwise are in float32. Sequences are read
and written as they lie, of any length; steps past the end count as zeros and are not stored. Offsets of rows have 64
bits.

Loops start at a program index that is always zero, which the compiler does not know: it would unroll them, and at once
hold more than there are registers for.

Nothing from `tl`'s own library of jitted functions is used, so that an interpreted copy of this file can be made beside
the compiled one.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _load(at, steps, r, rows_left, stride, LENGTH: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    """Steps of rows r of a sequence, in float32; `stride` lies between two rows."""
    pointers = at + steps if ROWS == 1 else at + r.to(tl.int64) * stride + steps
    if WHOLE:
        return tl.load(pointers).to(tl.float32)
    return tl.load(pointers, mask=(r < rows_left) & (steps < LENGTH), other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _store(at, value, steps, r, rows_left, stride, LENGTH: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    pointers = at + steps if ROWS == 1 else at + r.to(tl.int64) * stride + steps
    value = value.to(at.dtype.element_ty)
    if WHOLE:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=(r < rows_left) & (steps < LENGTH))


@triton.jit
@no_type_check
def _times(a, b, table, offsets, PLANE: tl.constexpr):
    """The complex product (a + ib) (c + id) with a table's planes, in float32."""
    c = tl.load(table + offsets).to(tl.float32)
    d = tl.load(table + PLANE + offsets).to(tl.float32)
    return a * c - b * d, a * d + b * c


@triton.jit
@no_type_check
def _left(
    x,
    factor,
    x_stride,
    factor_stride,
    rows_left,
    f1,
    twiddle,
    first_k1,
    zero,
    LENGTH: tl.constexpr,
    WHOLE: tl.constexpr,
    GATED: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """B, (k1 r, n2) in the dtype of the tables, of the real rows at x, or of factor x; BLOCK rows k1 of it."""
    k1 = tl.arange(0, BLOCK) + (first_k1 + zero)
    column = tl.arange(0, ROWS * N2) + zero
    r = (column // N2)[None, :]
    n2 = (column % N2)[None, :]
    dtype = f1.dtype.element_ty
    re = tl.full((BLOCK, ROWS * N2), 0.0, tl.float32)
    im = tl.full((BLOCK, ROWS * N2), 0.0, tl.float32)
    for first in range(tl.program_id(1), N1, CHUNK):
        n1 = first + tl.arange(0, CHUNK)
        steps = n1[:, None] * N2 + n2
        value = _load(x, steps, r, rows_left, x_stride, LENGTH, WHOLE, ROWS)
        if GATED:
            value *= _load(factor, steps, r, rows_left, factor_stride, LENGTH, WHOLE, ROWS)
        value = value.to(dtype)
        at = f1 + k1[:, None] * N1 + n1[None, :]
        re = tl.dot(tl.load(at), value, re)
        im = tl.dot(tl.load(at + N1 * N1), value, im)
    re, im = _times(re, im, twiddle, k1[:, None] * N2 + n2, N1 * N2)
    re = tl.reshape(re.to(dtype), (BLOCK * ROWS, N2))
    im = tl.reshape(im.to(dtype), (BLOCK * ROWS, N2))
    return re, im


@triton.jit
@no_type_check
def _right(re, im, f2, first, zero, N2: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of C from the first, (k1 r, CHUNK) in float32."""
    at = f2 + (tl.arange(0, N2) + zero)[:, None] * N2 + (first + tl.arange(0, CHUNK))[None, :]
    f2_re = tl.load(at)
    f2_im = tl.load(at + N2 * N2)
    c_im = tl.dot(im, f2_re, tl.dot(re, f2_im))
    return tl.dot(re, f2_re) - tl.dot(im, f2_im), c_im


@triton.jit
@no_type_check
def convolve(
    x,
    factor,
    gate,
    other_gate,
    spectrum,
    f1,
    f2,
    twiddle,
    out,
    other_out,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    LENGTH: tl.constexpr,
    X_CHANNELS: tl.constexpr,
    FACTOR_CHANNELS: tl.constexpr,
    GATE_CHANNELS: tl.constexpr,
    OTHER_CHANNELS: tl.constexpr,
    CONJUGATE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Makes out = gate (K * (factor x)) and other_out = other_gate (K * (factor x)), or with conj(K).

    Sequences are (B, their channels, D, L), with 1 channel that all share or C; a factor or a gate with 0 is not there,
    and neither is other_out then. The spectra of the taps are (D, C, re | im, N1, N2).
    """
    WHOLE: tl.constexpr = (LENGTH == N1 * N2) & (BATCH % ROWS == 0)
    STRIDE: tl.constexpr = FEATURES * LENGTH
    program = tl.program_id(0)
    spectra = program % (CHANNELS * FEATURES)
    first_row = program // (CHANNELS * FEATURES) * ROWS
    channel = spectra // FEATURES
    feature = spectra % FEATURES
    left = BATCH - first_row
    row = first_row.to(tl.int64)

    x += ((row * X_CHANNELS + channel % X_CHANNELS) * FEATURES + feature) * LENGTH
    if FACTOR_CHANNELS > 0:
        factor += ((row * FACTOR_CHANNELS + channel % FACTOR_CHANNELS) * FEATURES + feature) * LENGTH
    re, im = _left(
        x,
        factor,
        X_CHANNELS * STRIDE,
        FACTOR_CHANNELS * STRIDE,
        left,
        f1,
        twiddle,
        0,
        0,
        LENGTH,
        WHOLE,
        FACTOR_CHANNELS > 0,
        N1,
        N2,
        ROWS,
        N1,
        CHUNK,
    )

    rows = tl.arange(0, N1 * ROWS)[:, None]
    n2 = tl.arange(0, N2)[None, :]
    dtype = f1.dtype.element_ty
    taps = spectrum + (feature * CHANNELS + channel).to(tl.int64) * (2 * N1 * N2)
    g_re = tl.full((N1 * ROWS, N2), 0.0, tl.float32)
    g_im = tl.full((N1 * ROWS, N2), 0.0, tl.float32)
    for first in range(tl.program_id(1), N2, CHUNK):
        c_re, c_im = _right(re, im, f2, first, 0, N2, CHUNK)
        k2 = first + tl.arange(0, CHUNK)
        place = rows // ROWS * N2 + k2[None, :]
        if CONJUGATE:  # conj(conj(K) C) = K conj(C)
            d_re, d_im = _times(c_re, -c_im, taps, place, N1 * N2)
        else:
            d_re, d_im = _times(c_re, c_im, taps, place, N1 * N2)
            d_im = -d_im
        at = f2 + k2[:, None] * N2 + n2
        f2_re = tl.load(at)
        f2_im = tl.load(at + N2 * N2)
        minus = (-d_im).to(dtype)
        d_re = d_re.to(dtype)
        d_im = d_im.to(dtype)
        g_re = tl.dot(minus, f2_im, tl.dot(d_re, f2_re, g_re))
        g_im = tl.dot(d_im, f2_re, tl.dot(d_re, f2_im, g_im))

    g_re, g_im = _times(g_re, g_im, twiddle, rows // ROWS * N2 + n2, N1 * N2)
    e_re = tl.trans(tl.reshape(g_re.to(dtype), (N1, ROWS * N2)))
    e_im = tl.trans(tl.reshape((-g_im).to(dtype), (N1, ROWS * N2)))

    row_out = ((row * CHANNELS + channel) * FEATURES + feature) * LENGTH
    out += row_out
    if GATE_CHANNELS > 0:
        gate += ((row * GATE_CHANNELS + channel % GATE_CHANNELS) * FEATURES + feature) * LENGTH
    if OTHER_CHANNELS > 0:
        other_gate += ((row * OTHER_CHANNELS + channel % OTHER_CHANNELS) * FEATURES + feature) * LENGTH
        other_out += row_out
    column = tl.arange(0, ROWS * N2)[:, None]
    r = column // N2
    k1 = tl.arange(0, N1)[:, None]
    for first in range(tl.program_id(1), N1, CHUNK):
        n1 = (first + tl.arange(0, CHUNK))[None, :]
        at = f1 + k1 * N1 + n1
        y = tl.dot(e_im, tl.load(at + N1 * N1), tl.dot(e_re, tl.load(at)))
        steps = n1 * N2 + column % N2
        if OTHER_CHANNELS > 0:
            other = y * _load(other_gate, steps, r, left, OTHER_CHANNELS * STRIDE, LENGTH, WHOLE, ROWS)
            _store(other_out, other, steps, r, left, CHANNELS * STRIDE, LENGTH, WHOLE, ROWS)
        if GATE_CHANNELS > 0:
            y *= _load(gate, steps, r, left, GATE_CHANNELS * STRIDE, LENGTH, WHOLE, ROWS)
        _store(out, y, steps, r, left, CHANNELS * STRIDE, LENGTH, WHOLE, ROWS)


@triton.jit
@no_type_check
def correlate(
    x,
    factor,
    g,
    gate,
    f1,
    f2,
    twiddle,
    out,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    LENGTH: tl.constexpr,
    FACTOR_CHANNELS: tl.constexpr,
    GATE_CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_CHUNK: tl.constexpr,
):
    """Makes out = sum over the batch of conj(X) H, the cotangent of the spectra; X is that of factor x, H of gate g.

    x and factor are (B, D, L), g (B, C, D, L), the gate (B, 1 or C, D, L); out is (PARTS, D, C, re | im, N1, ROWS, N2)
    in float32, to be summed over its parts, which are shares of TILES tiles of the batch, and over their rows. One
    program makes BLOCK rows and CHUNK columns of a part; few enough that both spectra stay in registers.
    """
    WHOLE: tl.constexpr = (LENGTH == N1 * N2) & (BATCH % ROWS == 0)
    STRIDE: tl.constexpr = FEATURES * LENGTH
    ALL_TILES: tl.constexpr = (BATCH + ROWS - 1) // ROWS
    program = tl.program_id(0)
    first_column = program % (N2 // CHUNK) * CHUNK
    program = program // (N2 // CHUNK)
    first_k1 = program % (N1 // BLOCK) * BLOCK
    program = program // (N1 // BLOCK)
    spectra = program % (CHANNELS * FEATURES)
    part = program // (CHANNELS * FEATURES)
    channel = spectra // FEATURES
    feature = spectra % FEATURES

    wide = tl.program_id(1).to(tl.int64)  # zero, in 64 bits
    sum_re = tl.full((BLOCK * ROWS, CHUNK), 0.0, tl.float32)
    sum_im = tl.full((BLOCK * ROWS, CHUNK), 0.0, tl.float32)
    for tile in range(part * TILES, tl.minimum(part * TILES + TILES, ALL_TILES)):
        row = wide + tile * ROWS
        left = BATCH - tile * ROWS
        # Zero, which the compiler does not know, but that it divides by 128: else it would keep tables in registers, or
        # load them two bytes at a time.
        zero = tile // ALL_TILES * 128
        at = (row * FEATURES + feature) * LENGTH
        re, im = _left(
            x + at,
            factor + at,
            STRIDE,
            STRIDE,
            left,
            f1,
            twiddle,
            first_k1,
            zero,
            LENGTH,
            WHOLE,
            FACTOR_CHANNELS > 0,
            N1,
            N2,
            ROWS,
            BLOCK,
            SUM_CHUNK,
        )
        x_re, x_im = _right(re, im, f2, first_column, zero, N2, CHUNK)
        at = ((row * CHANNELS + channel) * FEATURES + feature) * LENGTH
        gate_at = (
            (row * GATE_CHANNELS + channel % (GATE_CHANNELS + (GATE_CHANNELS == 0))) * FEATURES + feature
        ) * LENGTH
        re, im = _left(
            g + at,
            gate + gate_at,
            CHANNELS * STRIDE,
            GATE_CHANNELS * STRIDE,
            left,
            f1,
            twiddle,
            first_k1,
            zero,
            LENGTH,
            WHOLE,
            GATE_CHANNELS > 0,
            N1,
            N2,
            ROWS,
            BLOCK,
            SUM_CHUNK,
        )
        h_re, h_im = _right(re, im, f2, first_column, zero, N2, CHUNK)
        sum_re += x_re * h_re + x_im * h_im
        sum_im += x_re * h_im - x_im * h_re

    PLANE: tl.constexpr = N1 * ROWS * N2
    at = out + ((part * FEATURES + feature) * CHANNELS + channel).to(tl.int64) * (2 * PLANE)
    at += (first_k1 * ROWS + tl.arange(0, BLOCK * ROWS))[:, None] * N2 + (first_column + tl.arange(0, CHUNK))[None, :]
    tl.store(at, sum_re)
    tl.store(at + PLANE, sum_im)
