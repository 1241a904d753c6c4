"""How a long sequence is cut for three passes over memory, and the tables of each pass.

n = m * 4096 points are the steps t = 4096 n1 + n2 of m rows of 4096. Their right-angle transform (`tables`) is then

    Z[k1, n2] = sum over n1 of exp(-2 pi i (k1 + 1/4) n1 / m) u[n1, n2]                                  (split)
    U[k1, k2] = sum over n2 of exp(-2 pi i (k2 + s) n2 / 4096) Z[k1, n2],   s = (k1 + 1/4) / m           (inner)

at the frequency k1 + m k2: m transforms of 4096 complex points, each shifted by its own s, with no twiddle between
the two, since the shift holds it. So the convolution is the product `split`, one short convolution of each row of Z
with its share of the taps' spectrum, and the adjoint of `split`, `join`, whose real part is the result. What the shift
changes are two of the inner tables, F1 and T, which are therefore those of the row:

    F1[p, a] = exp(-2 pi i (p + s) a / 64),      T[p, b] = exp(-2 pi i (p + s) b / 4096)

Where the batch has more than one sequence, rows of two of them may make a tile (`inner_chain`): matrices of 32 x 64, of
2048 steps, where one product splits twice as many rows, and of 32 x 128 beyond 128 rows where no way back is taken. F1
is of 32 x 32 then, F2 and T are as wide as the matrix, and the parts of Z are kept side by side, row by row.

More than 128 rows are cut once more, m = r h, so that one pass still does it all. With n1 = h a + b, k1 = ka + r kb

    Z[ka + r kb] = sum over b of F[kb, b] f[ka, b] (sum over a of exp(-2 pi i (ka + 1/4) a / r) u[h a + b])
    F[kb, b] = exp(-2 pi i kb b / h),       f[ka, b] = exp(-2 pi i (ka + 1/4) b / m)

and where r is 4, since a sum of four terms needs no roots but those of unity, with n1 = r b + a and k1 = kb + h ka

    Z[kb + h ka] = sum over a of exp(-2 pi i ka a / r) f[a, kb] (sum over b of F[kb, b] u[r b + a])
    F[kb, b] = exp(-2 pi i (kb + 1/4) b / h),       f[a, kb] = exp(-2 pi i (kb + 1/4) a / m)

whose products by F are of real numbers and not of complex ones. Rows of Z, and all that belongs to them, are kept in
the order of h ka + kb. Blocks are scaled by powers of two as in `tables`, and the taps' spectrum makes up the rest of
1/n.
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
"""r where there are more."""

LONGEST = RADICES[-1] * N1 * BLOCK
"""The longest sequence that three passes convolve, 4,194,304 steps."""


@dataclasses.dataclass(frozen=True)
class OuterPlan:
    """m = radix * height rows of Z of so many steps.

    Attributes:
      radix: 1 where one product splits them.
      height: the rows that a product makes.
      steps: 4096 or 2048.
      paired: whether rows of two sequences make a tile of the inner kernels, those of 2048 steps always.
    """

    radix: int
    height: int
    steps: int = BLOCK
    paired: bool = False

    @property
    def rows(self) -> int:
        """How many, m."""
        return self.radix * self.height

    @property
    def points(self) -> int:
        """The longest sequence that fits, n steps."""
        return self.rows * self.steps

    @property
    def row_height(self) -> int:
        """Rows of the matrix that a row of Z is."""
        return N1 // 2 if self.paired else N1

    @property
    def row_width(self) -> int:
        """Its columns."""
        return self.steps // self.row_height

    @property
    def real_products(self) -> bool:
        """Whether the products of two factors come before the sums over a of a split."""
        return self.radix == 4

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


def outer_plan(rows: int, batch: int = 1, both_ways: bool = False) -> OuterPlan:
    """The plan of the fewest points for sequences of so many rows of 4096 steps, so many of them.

    Rows of 4096 steps are paired where only the way there is taken: the sums of the way back have no registers beside
    32 x 128 points, and by the same plan both ways can share a split.

    Raises:
      NotImplementedError: for more than 1024 rows.

    Example:
      >>> outer_plan(16), outer_plan(200)
      (OuterPlan(radix=1, height=16, steps=4096, paired=False), OuterPlan(radix=4, height=64, steps=4096, paired=False))
      >>> outer_plan(16, batch=64)
      OuterPlan(radix=1, height=32, steps=2048, paired=True)
    """
    if batch > 1 and 2 * rows <= DIRECT_ROWS:
        return OuterPlan(1, 4 * -(-rows // 2), BLOCK // 2, paired=True)
    if rows <= DIRECT_ROWS:
        return OuterPlan(1, 4 * -(-rows // 4))  # twice as many rows of Z are a multiple of the 8 of a tile
    for radix in RADICES:
        height = 16 * -(-rows // (16 * radix))  # a multiple of the depth of a tensor-core product
        if height <= N1:
            return OuterPlan(radix, height, paired=batch > 1 and not both_ways)
    raise NotImplementedError(f"three passes take at most {LONGEST} steps; got {rows} rows of {BLOCK}.")


def _order(plan: OuterPlan) -> jax.Array:
    """k1 of each row of Z, in the order in which they are kept."""
    if plan.real_products:
        return jnp.arange(plan.rows)
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
    f = jnp.stack(_roots((jnp.arange(plan.radix)[:, None] + 0.25) * b / plan.rows), 1)
    return _cut(jnp.stack([re, im, -im]), h), f


def real_product_tables(plan: OuterPlan) -> tuple[jax.Array, jax.Array]:
    """F with the whole scale, as re | im `(2, 64, 64)`, with zeros beyond h, and f `(3, 2, 64)`, in float32.

    It lacks the f of a = 0, which is 1.
    """
    h, b = plan.height, jnp.arange(N1)
    f = jnp.stack(_roots(jnp.arange(1, plan.radix)[:, None] * (b + 0.25) / plan.rows), 1)
    return _cut(plan.scale * jnp.stack(_roots(jnp.outer(b, b) % h / h + b / (4 * h))), h), f


def _cut(blocks: jax.Array, h: int) -> jax.Array:
    """Blocks `(..., 64, 64)` with zeros beyond h rows and columns."""
    inside = jnp.arange(N1) < h
    return jnp.where(inside[:, None] & inside, blocks, 0.0)


def radix_roots(plan: OuterPlan) -> jax.Array:
    """exp(-2 pi i (ka + 1/4) a / r), scaled, as `(ka, re | im, a)` in float32."""
    ka, a = jnp.arange(plan.radix)[:, None] + 0.25, jnp.arange(plan.radix)
    return plan.radix_scale * jnp.stack(_roots(ka * a / plan.radix), 1)


def inner_tables(plan: OuterPlan, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first blocks of the rows, the `column_dft.blocks` of F2, and T of each row, `(m, 2, 64, 64)`.

    A row's first block is F1 as re | im | -im, `(m, 3, 64, 64)`; of paired rows `_real_form`, `(m, 1, 64, 64)`, of F2
    the half for the way there, and T is `in_thread_order`.
    """
    shift, height, width = ((_order(plan) + 0.25) / plan.rows)[:, None, None], plan.row_height, plan.row_width
    p, a, b = jnp.arange(height)[:, None], jnp.arange(height), jnp.arange(width)
    scale = block_scale(Config(TILE)) ** 0.5
    f1_re, f1_im = (scale * part for part in _roots(p * a % height / height + shift * a / height))
    f2 = column_dft.blocks(*(column_dft.in_order(scale * part) for part in _roots(b[:, None] * b % width / width)))
    roots = _roots(p * b / plan.steps + shift * b / plan.steps)
    if plan.paired:
        f1, f2 = _real_form(f1_re, f1_im), f2[:, : f2.shape[1] // 2]
        t = in_thread_order(*(part / column_dft.radix(width) for part in roots))
    else:
        f1 = jnp.stack([f1_re, f1_im, -f1_im], 1)
        t = jnp.stack([column_dft.twiddle_in_order(part) for part in roots], 1).astype(dtype)
    return f1.astype(dtype), f2.astype(dtype), t


def _real_form(re: jax.Array, im: jax.Array) -> jax.Array:
    """The transpose of [[re, -im], [im, re]] `(m, 1, 64, 64)` with eight rows of either half in turns."""
    real_form = jnp.stack([jnp.concatenate([re, -im], 2), jnp.concatenate([im, re], 2)], 1)
    in_turns = real_form.reshape(len(re), 2, -1, 8, N1).swapaxes(1, 2)
    return in_turns.reshape(len(re), 1, N1, N1).mT


def spectrum_scale(plan: OuterPlan) -> float:
    """What the transform of the taps, or its adjoint, is multiplied by: with all blocks' scales 1/n is left."""
    return 1 / (plan.points * (plan.scale * block_scale(Config(TILE))) ** 3)
