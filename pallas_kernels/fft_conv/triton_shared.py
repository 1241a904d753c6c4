"""Kernel bodies in Triton for tensor cores that read their operands from shared memory: 9.0 and 10.0.

The algebra is that of `triton_plans`: a row of the sequence is an N1 x N2 matrix X, and a program takes one row of the
batch after the other through the whole chain,

    A = F1 X            (k1, n2)      B = A * T
    C = B F2            (k1, k2)      D = conj(C * K)
    G = D F2            (k1, n2)      E = G * T
    Y = Re(F1)' Re(E) - Im(F1)' Im(E)           (n1, n2)

Conjugating once, at D, lets the way back use the forward tables. Rows of the batch meet in no product: a NaN stays in
its row.

Each complex product is one real product of twice the size, for a program waits for each. A is [Re F1; Im F1] X, and Y
is [Re F1' | -Im F1'] times [Re E; Im E]. Everything between has a number's real and imaginary part side by side, in
columns 2 k and 2 k + 1: what a product leaves in a thread's registers is then whole complex numbers, and, after a
shuffle within a warp, the next product's operand.

A program loads the tables of products once, and they stay in shared memory for all of its rows. Where that leaves too
few registers, F2 comes in pieces of CHUNK columns instead, which make a piece of C, of D and a term of G at once.
Twiddle and taps stay in registers (KEEP), or come again for each row, from a place that differs from row to row as far
as Triton's compiler knows: it would keep them. LLVM knows more, that a row before the last divided by their number is
zero, and then keeps every address, in two registers each. Where those are missing, a program index that is always zero
hides it (ANEW, PACKED).

PACKED saves more. X is rounded to 16 bits and put in pairs into integers, and H made in a loop that turns once, as far
as the compiler knows any number of times: it would round X only after H is there, and hold 32 bits a number. And n2 is
in the order in which what a thread has of B is what it needs of a left operand: sums have no order, and nothing is
shuffled.

Operands of products have the dtype of the tables, sums and everything elementwise are in float32. Sequences are read
and written as they lie, of any length; steps past the end count as zeros and are not stored. Offsets of rows have 64
bits.

Nothing from `tl`'s own library of jitted functions is used, so that an interpreted copy of this file can be made beside
the compiled one.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _load(at, steps, LENGTH: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(at + steps)
    return tl.load(at + steps, mask=steps < LENGTH, other=0.0)


@triton.jit
@no_type_check
def _store(at, value, steps, LENGTH: tl.constexpr, WHOLE: tl.constexpr):
    value = value.to(at.dtype.element_ty)
    if WHOLE:
        tl.store(at + steps, value)
    else:
        tl.store(at + steps, value, mask=steps < LENGTH)


@triton.jit
@no_type_check
def _product(x, factor, steps, dtype: tl.constexpr, LENGTH: tl.constexpr, WHOLE: tl.constexpr, GATED: tl.constexpr):
    """The row at x, or factor x."""
    value = _load(x, steps, LENGTH, WHOLE)
    if GATED:
        value = value.to(tl.float32) * _load(factor, steps, LENGTH, WHOLE).to(tl.float32)
    return value.to(dtype)


@triton.jit
@no_type_check
def _parts(z, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Real and imaginary parts in float32, (ROWS, COLUMNS) each, of what lies side by side."""
    return tl.split(tl.reshape(z, (ROWS, COLUMNS, 2)).to(tl.float32))


@triton.jit
@no_type_check
def _joined(re, im, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The parts side by side, (ROWS, 2 COLUMNS)."""
    return tl.reshape(tl.join(re.to(dtype), im.to(dtype)), (ROWS, 2 * COLUMNS))


@triton.jit
@no_type_check
def _packed(re, im, dtype: tl.constexpr):
    """Both parts in that dtype of 16 bits, in the two halves of an integer."""
    low = re.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | im.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
@no_type_check
def _unpacked(both, dtype: tl.constexpr):
    """The parts in float32."""
    re = both.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return re, (both >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
@no_type_check
def _ordered(z, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Complex numbers side by side with, of each 8, the even ones first: as `_order` says."""
    z = tl.reshape(z, (ROWS, COLUMNS // 8, 4, 2, 2))
    return tl.reshape(tl.permute(z, (0, 1, 3, 2, 4)), (ROWS, 2 * COLUMNS))


@triton.jit
@no_type_check
def _order(column):
    """Where the parts come from that `_ordered` puts into a column."""
    return column // 16 * 16 + column % 8 // 2 * 4 + column // 8 % 2 * 2 + column % 2


@triton.jit
@no_type_check
def _correlated(sum_re, sum_im, x_re, x_im, h_re, h_im):
    """The sums, and conj(X) H."""
    sum_re += x_re * h_re + x_im * h_im
    sum_im += x_re * h_im - x_im * h_re
    return sum_re, sum_im


@triton.jit
@no_type_check
def _left(x, f1, turn, K1: tl.constexpr, N2: tl.constexpr):
    """B, (K1, 2 N2) in the dtype of the tables, of X."""
    re, im = tl.split(tl.permute(tl.reshape(tl.dot(f1, x), (2, K1, N2)), (1, 2, 0)))
    turn_re, turn_im = _parts(turn, K1, N2)
    return _joined(re * turn_re - im * turn_im, re * turn_im + im * turn_re, x.dtype, K1, N2)


@triton.jit
@no_type_check
def _filtered(c_re, c_im, taps, CONJUGATE: tl.constexpr, N1: tl.constexpr, COLUMNS: tl.constexpr):
    """D, the parts of conj(C K), or of conj(C conj(K))."""
    k_re, k_im = _parts(taps, N1, COLUMNS)
    if CONJUGATE:
        return c_re * k_re + c_im * k_im, c_re * k_im - c_im * k_re
    return c_re * k_re - c_im * k_im, -(c_re * k_im + c_im * k_re)


@triton.jit
@no_type_check
def _last(g, f1, turn, N1: tl.constexpr, N2: tl.constexpr):
    """Y, (N1, N2) in float32, of G."""
    dtype: tl.constexpr = f1.dtype
    g_re, g_im = _parts(g, N1, N2)
    turn_re, turn_im = _parts(turn, N1, N2)
    re = (g_re * turn_re - g_im * turn_im).to(dtype)
    im = (g_re * turn_im + g_im * turn_re).to(dtype)
    return tl.dot(f1, tl.reshape(tl.permute(tl.join(re, im), (2, 0, 1)), (2 * N1, N2)))


@triton.jit
@no_type_check
def convolve(
    x,
    factor,
    gate,
    other_gate,
    spectrum,
    f1,
    f1_back,
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
    ROWS: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CHUNK: tl.constexpr,
    KEEP: tl.constexpr,
    ANEW: tl.constexpr,
):
    """Makes out = gate (K * (factor x)) and other_out = other_gate (K * (factor x)), or with conj(K).

    Sequences are (B, their channels, D, L), with 1 channel that all share or C; a factor or a gate with 0 is not there,
    and neither is other_out then. The spectra of the taps are (D, C, N1, N2 re/im). A program takes ROWS rows.
    """
    WHOLE: tl.constexpr = LENGTH == N1 * N2
    X_STRIDE: tl.constexpr = X_CHANNELS * FEATURES * LENGTH
    dtype: tl.constexpr = f1.dtype.element_ty
    program = tl.program_id(0)
    spectra = program % (CHANNELS * FEATURES)
    first = program // (CHANNELS * FEATURES) * ROWS
    end = tl.minimum(first + ROWS, BATCH)
    channel = spectra // FEATURES
    feature = spectra % FEATURES
    wide = tl.program_id(1).to(tl.int64)  # zero, in 64 bits

    n1 = tl.arange(0, N1)[:, None]
    both_n1 = tl.arange(0, 2 * N1)
    both_n2 = tl.arange(0, 2 * N2)
    steps = n1 * N2 + tl.arange(0, N2)[None, :]
    pairs = n1 * (2 * N2) + both_n2[None, :]
    spectrum += (feature * CHANNELS + channel).to(tl.int64) * (2 * N1 * N2)
    left = tl.load(f1 + both_n1[:, None] * N1 + tl.arange(0, N1)[None, :])
    back = tl.load(f1_back + n1 * (2 * N1) + both_n1[None, :])
    if CHUNK == N2:
        right = tl.load(f2 + both_n2[:, None] * (2 * N2) + both_n2[None, :])
    if KEEP:
        turn = tl.load(twiddle + pairs)
        taps = tl.load(spectrum + pairs)

    x += (((wide + first) * X_CHANNELS + channel % X_CHANNELS) * FEATURES + feature) * LENGTH
    for row in range(first, end):
        zero = row // BATCH * 128  # which the compiler does not know, but that it divides by 128
        if ANEW:  # nor LLVM
            zero = (row + tl.program_id(1)) // BATCH * 128
            row += zero
        value = _load(x, steps, LENGTH, WHOLE)
        x += X_STRIDE
        row = wide + row
        if FACTOR_CHANNELS > 0:
            at = factor + ((row * FACTOR_CHANNELS + channel % FACTOR_CHANNELS) * FEATURES + feature) * LENGTH
            value = value.to(tl.float32) * _load(at, steps, LENGTH, WHOLE).to(tl.float32)
        if not KEEP:
            turn = tl.load(twiddle + zero + pairs)
        b = _left(value.to(dtype), left, turn, N1, N2)

        if CHUNK == N2:
            if not KEEP:
                taps = tl.load(spectrum + zero + pairs)
            c_re, c_im = _parts(tl.dot(b, right), N1, N2)
            d_re, d_im = _filtered(c_re, c_im, taps, CONJUGATE, N1, N2)
            g = tl.dot(_joined(d_re, d_im, dtype, N1, N2), right)
        else:
            g = tl.full((N1, 2 * N2), 0.0, tl.float32)
            for column in range(tl.program_id(1), 2 * N2, 2 * CHUNK):  # from zero that is not known: not unrolled
                columns = column + zero + tl.arange(0, 2 * CHUNK)
                c = tl.dot(b, tl.load(f2 + both_n2[:, None] * (2 * N2) + columns[None, :]))
                c_re, c_im = _parts(c, N1, CHUNK)
                taps = tl.load(spectrum + n1 * (2 * N2) + columns[None, :])
                d_re, d_im = _filtered(c_re, c_im, taps, CONJUGATE, N1, CHUNK)
                piece = tl.load(f2 + columns[:, None] * (2 * N2) + both_n2[None, :])
                g = tl.dot(_joined(d_re, d_im, dtype, N1, CHUNK), piece, g)
            if not KEEP:
                turn = tl.load(twiddle + 2 * zero + pairs)
        y = _last(g, back, turn, N1, N2)

        at_out = ((row * CHANNELS + channel) * FEATURES + feature) * LENGTH
        if OTHER_CHANNELS > 0:
            at = other_gate + ((row * OTHER_CHANNELS + channel % OTHER_CHANNELS) * FEATURES + feature) * LENGTH
            other = y * _load(at, steps, LENGTH, WHOLE).to(tl.float32)
            _store(other_out + at_out, other, steps, LENGTH, WHOLE)
        if GATE_CHANNELS > 0:
            at = gate + ((row * GATE_CHANNELS + channel % GATE_CHANNELS) * FEATURES + feature) * LENGTH
            y *= _load(at, steps, LENGTH, WHOLE).to(tl.float32)
        _store(out + at_out, y, steps, LENGTH, WHOLE)


@triton.jit
@no_type_check
def backward(
    x,
    factor,
    g,
    gate,
    spectrum,
    f1,
    f1_back,
    f2,
    twiddle,
    dx,
    d_factor,
    out,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    LENGTH: tl.constexpr,
    FACTOR_CHANNELS: tl.constexpr,
    GATE_CHANNELS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Makes out = sum over the batch of conj(X) H, the cotangent of the spectra; X is that of factor x, H of gate g.

    With SEQUENCES also dx = factor (conj(K) * (gate g)), and d_factor = x (conj(K) * (gate g)) if there is a factor,
    from the same H. x and factor are (B, 1, D, L), g (B, C, D, L), the gate (B, 1 or C, D, L), dx and d_factor as g.
    out is (parts, D, C, N1, N2 re/im) in float32, to be summed over its parts, of ROWS rows of the batch each. A
    program makes BLOCK rows and COLUMNS columns of a part, all of them where it makes sequences.
    """
    WHOLE: tl.constexpr = LENGTH == N1 * N2
    dtype: tl.constexpr = f1.dtype.element_ty
    program = tl.program_id(0)
    first_column = program % (N2 // COLUMNS) * (2 * COLUMNS)
    program = program // (N2 // COLUMNS)
    first_k1 = program % (N1 // BLOCK) * BLOCK
    program = program // (N1 // BLOCK)
    spectra = program % (CHANNELS * FEATURES)
    part = program // (CHANNELS * FEATURES)
    channel = spectra // FEATURES
    feature = spectra % FEATURES
    wide = tl.program_id(1).to(tl.int64)

    n1 = tl.arange(0, N1)[:, None]
    k1 = (first_k1 + tl.arange(0, BLOCK))[:, None]
    planes = tl.arange(0, 2 * BLOCK)
    both_n2 = tl.arange(0, 2 * N2)
    columns = (first_column + tl.arange(0, 2 * COLUMNS))[None, :]
    steps = n1 * N2 + tl.arange(0, N2)[None, :]
    if PACKED:
        twiddle += first_k1 * (2 * N2)
        pairs = tl.arange(0, BLOCK)[:, None] * (2 * N2) + both_n2[None, :]
        rows = _order(both_n2)
    else:
        twiddle += k1 * (2 * N2) + both_n2[None, :]
        rows = both_n2
    places = k1 * (2 * N2) + columns
    spectrum += (feature * CHANNELS + channel).to(tl.int64) * (2 * N1 * N2)
    k1_of_planes = planes // BLOCK * N1 + first_k1 + planes % BLOCK
    left = tl.load(f1 + k1_of_planes[:, None] * N1 + tl.arange(0, N1)[None, :])
    right = tl.load(f2 + rows[:, None] * (2 * N2) + columns)
    if SEQUENCES:
        back = tl.load(f1_back + n1 * (2 * N1) + tl.arange(0, 2 * N1)[None, :])
    sum_re = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    sum_im = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)

    for row in range(part * ROWS, tl.minimum(part * ROWS + ROWS, BATCH)):
        zero = row // BATCH * 128
        if PACKED:
            zero = (row + tl.program_id(1)) // BATCH * 128
        row = wide + row
        at_x = (row * FEATURES + feature) * LENGTH
        at_g = ((row * CHANNELS + channel) * FEATURES + feature) * LENGTH
        at_gate = (
            (row * GATE_CHANNELS + channel % (GATE_CHANNELS + (GATE_CHANNELS == 0))) * FEATURES + feature
        ) * LENGTH
        value = _product(x + at_x, factor + at_x, steps, dtype, LENGTH, WHOLE, FACTOR_CHANNELS > 0)
        if PACKED:
            b = _left(value, left, tl.load(twiddle + zero + pairs), BLOCK, N2)
            x_re, x_im = _parts(tl.dot(_ordered(b, BLOCK, N2), right), BLOCK, COLUMNS)
            both = _packed(x_re, x_im, dtype)
            for once in range(tl.program_id(1) + 1):
                at = at_g + once * 128
                value = _product(g + at, gate + at_gate + once * 128, steps, dtype, LENGTH, WHOLE, GATE_CHANNELS > 0)
                b = _left(value, left, tl.load(twiddle + once * 128 + pairs), BLOCK, N2)
                h_re, h_im = _parts(tl.dot(_ordered(b, BLOCK, N2), right), BLOCK, COLUMNS)
                x_re, x_im = _unpacked(both + once, dtype)
                sum_re, sum_im = _correlated(sum_re, sum_im, x_re, x_im, h_re, h_im)
        else:
            b = _left(value, left, tl.load(twiddle + zero), BLOCK, N2)
            x_re, x_im = _parts(tl.dot(b, right).to(dtype), BLOCK, COLUMNS)
            value = _product(g + at_g, gate + at_gate, steps, dtype, LENGTH, WHOLE, GATE_CHANNELS > 0)
            b = _left(value, left, tl.load(twiddle + 2 * zero), BLOCK, N2)
            h_re, h_im = _parts(tl.dot(b, right), BLOCK, COLUMNS)
            sum_re, sum_im = _correlated(sum_re, sum_im, x_re, x_im, h_re, h_im)

        if SEQUENCES:
            d_re, d_im = _filtered(h_re, h_im, tl.load(spectrum + zero + places), True, N1, N2)
            y = _last(tl.dot(_joined(d_re, d_im, dtype, N1, N2), right), back, tl.load(twiddle + 3 * zero), N1, N2)
            if FACTOR_CHANNELS > 0:
                other = y * _load(x + at_x + zero, steps, LENGTH, WHOLE).to(tl.float32)
                _store(d_factor + at_g, other, steps, LENGTH, WHOLE)
                y *= _load(factor + at_x + zero, steps, LENGTH, WHOLE).to(tl.float32)
            _store(dx + at_g, y, steps, LENGTH, WHOLE)

    out += ((part * FEATURES + feature) * CHANNELS + channel).to(tl.int64) * (2 * N1 * N2)
    tl.store(out + places, _joined(sum_re, sum_im, tl.float32, BLOCK, COLUMNS))
