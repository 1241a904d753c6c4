"""How a long sequence is cut for three passes over memory, and the tables of each pass.

n = m * 4096 points are the steps t = 4096 n1 + n2 of m rows of 4096. Their right-angle transform (`tables`) is then

    Z[k1, n2] = sum over n1 of exp(-2 pi i (k1 + 1/4) n1 / m) u[n1, n2]                                  (split)
    U[k1, k2] = sum over n2 of exp(-2 pi i (k2 + s) n2 / 4096) Z[k1, n2],   s = (k1 + 1/4) / m           (inner)

at the frequency k1 + m k2: m transforms of 4096 complex points, each shifted by its own s, with no twiddle between
the two, since the shift holds it. So the convolution is the product `split`, one short convolution of each row of Z
with its share of the taps' spectrum, and the adjoint of `split`, `join`, whose real part is the result. What the shift
changes are two of the inner tables, F1 and T, which are therefore those of the row:

    F1[p, a] = exp(-2 pi i (p + s) a / 64),      T[p, b] = exp(-2 pi i (p + s) b / 4096)

Where one product splits twice as many rows, too, and the batch has more than one sequence, rows have 2048 steps, F1 is
of 32 x 32, and rows of two sequences make a tile (`inner_chain`). Parts of Z are kept side by side then, row by row.

More than 128 rows are cut once more, m = r h with n1 = h a + b and k1 = ka + r kb, so that one pass still does it all:

    Z[ka + r kb] = sum over b of F[kb, b] f[ka, b] (sum over a of exp(-2 pi i (ka + 1/4) a / r) u[h a + b])
    F[kb, b] = exp(-2 pi i kb b / h),       f[ka, b] = exp(-2 pi i (ka + 1/4) b / m)

Rows of Z, and all that belongs to them, are kept in the order of h ka + kb. Blocks are scaled by powers of two as in
`tables`, and the taps' spectrum makes up the rest of 1/n.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fft_conv import column_dft
from pallas_kernels.fft_conv.config import BLOCK, N1, TILE, Config
from pallas_kernels.fft_conv.rearranged import in_thread_order
from pallas_kernels.fft_conv.tables import block_scale

DIRECT_ROWS = 128
"""The most rows of a split by one product: its matrix of twice as many rows is 64 KB."""

RADICES = (4, 8, 16)
"""r where there are more: four warpgroups share the sums over a."""

LONGEST = RADICES[-1] * N1 * BLOCK
"""The longest sequence that three passes convolve, 4,194,304 steps."""


@dataclasses.dataclass(frozen=True)
class OuterPlan:
    """m = radix * height rows of 4096 or 2048 points; radix is 1 where one product splits them."""

    radix: int
    height: int
    steps: int = BLOCK

    @property
    def rows(self) -> int:
        """How many, m."""
        return self.radix * self.height

    @property
    def points(self) -> int:
        """The longest sequence that fits, n steps."""
        return self.rows * self.steps

    @property
    def paired(self) -> bool:
        """Whether rows of two sequences make a tile."""
        return self.steps < BLOCK

    @property
    def row_height(self) -> int:
        """Rows of the matrix that a row is, 64 or 32."""
        return self.steps // TILE

    @property
    def scale(self) -> float:
        """What a split multiplies by, and a join again: a power of two near 1 / sqrt(m)."""
        return self.radix_scale * _scale(self.height)

    @property
    def radix_scale(self) -> float:
        """The share of that of the sums over a."""
        return _scale(self.radix)


def _scale(size: int) -> float:
    return 2.0 ** -round(np.log2(size) / 2)


def outer_plan(rows: int, batch: int = 1) -> OuterPlan:
    """The plan of the fewest points for sequences of so many rows of 4096 steps, so many of them.

    Raises:
      NotImplementedError: for more than 1024 rows.

    Example:
      >>> outer_plan(16), outer_plan(200)
      (OuterPlan(radix=1, height=16, steps=4096), OuterPlan(radix=4, height=64, steps=4096))
      >>> outer_plan(16, batch=64)
      OuterPlan(radix=1, height=32, steps=2048)
    """
    if batch > 1 and 2 * rows <= DIRECT_ROWS:
        return OuterPlan(1, 4 * -(-rows // 2), BLOCK // 2)
    if rows <= DIRECT_ROWS:
        return OuterPlan(1, 4 * -(-rows // 4))  # twice as many rows of Z are a multiple of the 8 of a tile
    for radix in RADICES:
        height = 16 * -(-rows // (16 * radix))  # a multiple of the depth of a tensor-core product
        if height <= N1:
            return OuterPlan(radix, height)
    raise NotImplementedError(f"three passes take at most {LONGEST} steps; got {rows} rows of {BLOCK}.")


def _order(plan: OuterPlan) -> jax.Array:
    """k1 of each row of Z, in the order in which they are kept."""
    return (jnp.arange(plan.radix)[:, None] + plan.radix * jnp.arange(plan.height)).ravel()


def _roots(turns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Real and imaginary part of exp(-2 pi i turns)."""
    angle = -2 * np.pi * (turns % 1)
    return jnp.cos(angle), jnp.sin(angle)


def split_matrix(plan: OuterPlan) -> tuple[jax.Array, jax.Array]:
    """Both parts of exp(-2 pi i (k1 + 1/4) n1 / m), scaled, `(m, m)` in float32, for a radix of 1."""
    m, n1 = plan.rows, jnp.arange(plan.rows)
    re, im = _roots(jnp.outer(n1, n1) % m / m + n1 / (4 * m))
    return plan.scale * re, plan.scale * im


def stage_matrix(plan: OuterPlan) -> jax.Array:
    """Both parts of it, `(2 m, m)`: the real ones above the others, or of rows of 2048 steps row by row in turns."""
    return jnp.stack(split_matrix(plan), int(plan.paired)).reshape(2 * plan.rows, plan.rows)


def radix_tables(plan: OuterPlan) -> tuple[jax.Array, jax.Array]:
    """F, scaled, as re | im | -im `(3, 64, 64)`, with zeros beyond h, and f `(r, 2, 64)`, in float32."""
    h, b = plan.height, jnp.arange(N1)
    re, im = (_scale(h) * part for part in _roots(jnp.outer(b, b) % h / h))
    inside = (b < h)[:, None] & (b < h)
    f = jnp.stack(_roots((jnp.arange(plan.radix)[:, None] + 0.25) * b / plan.rows), 1)
    return jnp.where(inside, jnp.stack([re, im, -im]), 0.0), f


def radix_roots(plan: OuterPlan) -> jax.Array:
    """exp(-2 pi i (ka + 1/4) a / r), scaled, as `(ka, re | im, a)` in float32."""
    ka, a = jnp.arange(plan.radix)[:, None] + 0.25, jnp.arange(plan.radix)
    return plan.radix_scale * jnp.stack(_roots(ka * a / plan.radix), 1)


def inner_tables(plan: OuterPlan, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first blocks of the rows, the `column_dft.blocks` of F2, and T of each row, `(m, 2, 64, 64)`.

    A row's first block is F1 as re | im | -im, `(m, 3, 64, 64)`; of rows of 2048 steps `_real_form`, `(m, 1, 64, 64)`,
    and T is `in_thread_order`.
    """
    shift, height = ((_order(plan) + 0.25) / plan.rows)[:, None, None], plan.row_height
    p, a, b = jnp.arange(height)[:, None], jnp.arange(height), jnp.arange(TILE)
    scale = block_scale(Config(TILE)) ** 0.5
    f1_re, f1_im = (scale * part for part in _roots(p * a % height / height + shift * a / height))
    f2 = [column_dft.in_order(scale * part) for part in _roots(b[:, None] * b % TILE / TILE)]
    t = _roots(p * b / plan.steps + shift * b / plan.steps)
    if plan.paired:
        f1, t = _real_form(f1_re, f1_im), in_thread_order(*(part / column_dft.radix(TILE) for part in t))
    else:
        f1 = jnp.stack([f1_re, f1_im, -f1_im], 1)
        t = jnp.stack(list(map(column_dft.twiddle_in_order, t)), 1).astype(dtype)
    return f1.astype(dtype), column_dft.blocks(*f2).astype(dtype), t


def _real_form(re: jax.Array, im: jax.Array) -> jax.Array:
    """The transpose of [[re, -im], [im, re]] `(m, 1, 64, 64)` with eight rows of either half in turns."""
    real_form = jnp.stack([jnp.concatenate([re, -im], 2), jnp.concatenate([im, re], 2)], 1)
    in_turns = real_form.reshape(len(re), 2, -1, 8, N1).swapaxes(1, 2)
    return in_turns.reshape(len(re), 1, N1, N1).mT


def spectrum_scale(plan: OuterPlan) -> float:
    """What the transform of the taps, or its adjoint, is multiplied by: with all blocks' scales 1/n is left."""
    return 1 / (plan.points * (plan.scale * block_scale(Config(TILE))) ** 3)
