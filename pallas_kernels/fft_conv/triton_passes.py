"""What a convolution and its cotangents are launched as, on the device at hand: each shard runs these functions.

Sequences are `(B, 1 or C, D, L)`, taps `(D, C, 1 or 2, n)` in float32; where a gate is not there, no kernel reads its
operand.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fft_conv import triton_launch
from pallas_kernels.fft_conv.platform import varying_alike
from pallas_kernels.fft_conv.triton_plans import Card, Plan, SharedPlan

_PROGRAMS = 1024
"""As many programs keep any card busy: where there are fewer spectra of taps, shares of the batch are summed apart."""


def compute_dtype(dtype) -> jnp.dtype:
    """Of the operands of products, for sequences of a dtype.

    Raises:
      NotImplementedError: for a dtype that the kernels do not take.

    Example:
      >>> compute_dtype(jnp.float32)
      dtype(bfloat16)
    """
    if dtype in (jnp.bfloat16, jnp.float16):
        return jnp.dtype(dtype)
    if dtype == jnp.float32:
        return jnp.dtype(jnp.bfloat16)
    raise NotImplementedError(f"the Triton kernels take bfloat16, float16 and float32; got {dtype}.")


def plan_of(taps: jax.Array, card: Card) -> Plan:
    """The plan whose transform has as many points as these taps."""
    return next(plan for plan in card.plans if plan.points == taps.shape[-1])


def flat_tables(plan: Plan) -> jax.Array:
    """All tables of a plan, in float32, one after the other."""
    return jnp.asarray(np.concatenate([table.ravel() for table in plan.tables()]), jnp.float32)


def _split(tables: jax.Array, plan: Plan, dtype) -> list[jax.Array]:
    shapes = [table.shape for table in plan.tables()]
    pieces = jnp.split(tables.astype(compute_dtype(dtype)), np.cumsum([np.prod(shape) for shape in shapes])[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def run_forward(u, pre_gate, post_gate, taps, tables, *, gates: tuple[bool, bool]) -> jax.Array:
    """y, `(B, C, D, L)`."""
    launches = _Launches(u, taps, tables)
    pre_gate, post_gate = (x if there else None for x, there in zip((pre_gate, post_gate), gates, strict=True))
    (y,) = launches.convolve(u, pre_gate, post_gate, None, conjugate=False)
    return y


def run_backward(u, pre_gate, post_gate, g, taps, tables, *, gates: tuple[bool, bool]) -> tuple[jax.Array, ...]:
    """Cotangents of u and of the gates that there are, of each a share for each channel `(B, C, D, L)`, and of taps."""
    launches = _Launches(u, taps, tables)
    pre_gate, post_gate = (x if there else None for x, there in zip((pre_gate, post_gate), gates, strict=True))
    if isinstance(launches.plan, SharedPlan):
        shares, d_spectra = launches.backward(u, pre_gate, g, post_gate, sequences=launches.plan.together)
    else:
        shares, d_spectra = [], launches.correlate(u, pre_gate, g, post_gate)
    if not shares:
        shares = launches.convolve(g, post_gate, pre_gate, None if pre_gate is None else u, conjugate=True)
    if post_gate is not None:
        shares = [*shares, *launches.convolve(u, pre_gate, g, None, conjugate=False)]
    return *shares, launches.plan.cotangent_of_taps(*varying_alike(d_spectra, taps))


def _channels(sequence: jax.Array | None) -> int:
    return 0 if sequence is None else sequence.shape[1]


class _Launches:
    """The kernels, with what all launches of a convolution share."""

    def __init__(self, u, taps, tables):
        self.card = triton_launch.this_card()
        self.plan = plan_of(taps, self.card)
        self.tables = _split(tables, self.plan, u.dtype)
        self.spectra = self.plan.spectra(taps).astype(self.tables[0].dtype)
        batch, _, features, length = u.shape
        self.shape = batch, taps.shape[1], features, length
        self.dtype = u.dtype
        self.filters = taps.shape[1] * features  # spectra of taps
        self.sizes = dict(zip(("BATCH", "CHANNELS", "FEATURES", "LENGTH"), self.shape, strict=True))

    def convolve(self, x, factor, gate, other_gate, *, conjugate: bool) -> list[jax.Array]:
        """`convolve` of either kind of kernels: out, and other_out if there is another gate."""
        out = jax.ShapeDtypeStruct(self.shape, self.dtype)
        other_out = jax.ShapeDtypeStruct((1,) if other_gate is None else self.shape, self.dtype)
        rows = self.plan.rows_of_program("convolve", self.shape[0], self.filters)
        constants = {
            "X_CHANNELS": _channels(x),
            "FACTOR_CHANNELS": _channels(factor),
            "GATE_CHANNELS": _channels(gate),
            "OTHER_CHANNELS": _channels(other_gate),
            "CONJUGATE": int(conjugate),
            "ROWS": rows,
        }
        gates = (x if sequence is None else sequence for sequence in (factor, gate, other_gate))
        programs = -(-self.shape[0] // rows) * self.filters
        results = self._launch(
            "convolve", (x, *gates, self.spectra, *self.tables), (out, other_out), programs, constants
        )
        return results if other_gate is not None else results[:1]

    def backward(self, x, factor, g, gate, *, sequences: bool) -> tuple[list[jax.Array], jax.Array]:
        """`backward` of `triton_shared`: shares of the cotangents of x and of its factor, and that of the spectra."""
        plan = self.plan
        pieces = 1 if sequences else plan.n1 // plan.block * (plan.n2 // plan.columns)
        rows = plan.rows_of_program("backward", self.shape[0], self.filters * pieces)
        parts = -(-self.shape[0] // rows)
        constants = {
            "FACTOR_CHANNELS": _channels(factor),
            "GATE_CHANNELS": _channels(gate),
            "SEQUENCES": int(sequences),
            "ROWS": rows,
        }
        results = [
            jax.ShapeDtypeStruct(self.shape if sequences else (1,), self.dtype),
            jax.ShapeDtypeStruct(self.shape if sequences and factor is not None else (1,), self.dtype),
            jax.ShapeDtypeStruct((parts, *self.spectra.shape), jnp.float32),
        ]
        operands = x, x if factor is None else factor, g, g if gate is None else gate, self.spectra, *self.tables
        *shares, sums = self._launch("backward", operands, results, parts * self.filters * pieces, constants)
        return shares[: sequences * (1 + (factor is not None))], sums.sum(0)

    def correlate(self, x, factor, g, gate) -> jax.Array:
        """`correlate` of `triton_registers`: the cotangent of the spectra."""
        batch, channels, features, _ = self.shape
        plan, rows = self.plan, self.plan.rows_of_program("correlate", batch, self.filters)
        pieces = plan.n1 // plan.block * (plan.n2 // plan.columns)
        all_tiles = -(-batch // rows)
        tiles = -(-all_tiles // max(1, min(all_tiles, _PROGRAMS // (self.filters * pieces))))
        parts = -(-all_tiles // tiles)
        constants = {
            "FACTOR_CHANNELS": _channels(factor),
            "GATE_CHANNELS": _channels(gate),
            "PARTS": parts,
            "TILES": tiles,
            "ROWS": rows,
        }
        out = jax.ShapeDtypeStruct((parts, features, channels, 2, plan.n1, rows, plan.n2), jnp.float32)
        operands = x, x if factor is None else factor, g, g if gate is None else gate, *self.tables
        (sums,) = self._launch("correlate", operands, (out,), parts * self.filters * pieces, constants)
        return sums.sum((0, 5))

    def _launch(self, name, operands, results, programs, constants) -> list[jax.Array]:
        return triton_launch.launch(name, operands, results, programs, self.plan, self.card, self.sizes | constants)
