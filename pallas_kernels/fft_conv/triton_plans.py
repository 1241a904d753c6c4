"""What the Triton kernels are cut up into, the cards that they are for, and the tables that they read.

A `Plan` is one for all cards, because tiles are bounded by registers, of which every card has 255 for a thread; the
cards differ in shared memory and in how Triton multiplies on them: `HMMA` on 8.x and 12.0, `HGMMA` on 9.0, `UTCHMMA`
on 10.0. What the compiler makes of each plan on each card is committed beside the tests, which check `Plan.shared`
with it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fft_conv.tables import twist


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a convolution is cut up.

    Attributes:
      n1, n2: the DFT factors; the transform has n1 n2 points.
      rows: of the batch, side by side in a tile of n1 x (rows n2) numbers.
      warps: of a program of `convolve`, which carries one tile; one of `correlate` has 4.
      block: rows k1 that a program of `correlate` makes.
      shared: bytes of shared memory that no kernel of this plan needs more of, on any card.
      chunk: columns of a right operand that are there at once.
      stages: copies of a piece that a loop has under way.

    Raises:
      ValueError: for sizes that no kernel has.
    """

    n1: int
    n2: int
    rows: int
    warps: int
    block: int
    shared: int
    chunk: int = 16
    stages: int = 1

    def __post_init__(self):
        for name, least in (
            ("n1", 64),
            ("n2", 16),
            ("rows", 1),
            ("warps", 4),
            ("block", 32),
            ("chunk", 16),
            ("stages", 1),
        ):
            value = getattr(self, name)
            if value < least or (name != "stages" and value & (value - 1)):
                raise ValueError(f"{name} must be a power of two from {least}; got {value}.")
        if self.block > self.n1:
            raise ValueError(f"block must be at most n1, {self.n1}; got {self.block}.")
        if self.chunk > min(self.n1, self.n2):
            raise ValueError(f"chunk must be at most n1 and n2, {self.n1} and {self.n2}; got {self.chunk}.")

    @property
    def points(self) -> int:
        """The transform's complex points; the longest sequence it convolves."""
        return self.n1 * self.n2

    @property
    def scale(self) -> float:
        """What both blocks together multiply a spectrum by."""
        return _scale(self.n1) * _scale(self.n2)


PLANS = (
    Plan(64, 16, rows=2, warps=4, block=64, shared=24 * 1024),
    Plan(64, 32, rows=1, warps=4, block=64, shared=24 * 1024),
    Plan(64, 64, rows=1, warps=4, block=32, shared=40 * 1024),
    Plan(128, 64, rows=1, warps=8, block=32, shared=72 * 1024),
)
"""Shortest first."""


@dataclasses.dataclass(frozen=True)
class Card:
    """A kind of GPU: its compute capability, and the bytes of shared memory that one block may use."""

    capability: str
    shared: int

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Those for which it has the shared memory."""
        return tuple(plan for plan in PLANS if plan.shared <= self.shared)

    @property
    def longest(self) -> int:
        """The longest sequence, 0 where there is no room for any.

        Example:
          >>> CARDS["8.6"].longest
          8192
        """
        return max((plan.points for plan in self.plans), default=0)


CARDS = {
    card.capability: card
    for card in (
        Card("8.0", 163 * 1024),  # A100, A30
        Card("8.6", 99 * 1024),  # RTX 30, A40, A10
        Card("8.9", 99 * 1024),  # RTX 40, L4, L40S
        Card("9.0", 227 * 1024),  # H100, H200
        Card("10.0", 227 * 1024),  # B200
        Card("12.0", 99 * 1024),  # RTX 50, RTX PRO 6000
    )
}
"""Those for which every kernel was compiled, by compute capability."""


def card_of(capabilities: set[str]) -> Card:
    """The card, for the compute capabilities of all devices of a process.

    Raises:
      NotImplementedError: if the kernels are not for it, or if there are several kinds.

    Example:
      >>> card_of({"8.9"}).shared
      101376
    """
    if len(capabilities) > 1:
        raise NotImplementedError(
            f"the Triton kernels are compiled for one kind of GPU; the compute capabilities here are "
            f'{sorted(capabilities)}. Choose with CUDA_VISIBLE_DEVICES, or use implementation="xla".'
        )
    (capability,) = capabilities
    if float(capability) < 8.0:
        raise NotImplementedError(
            f"the Triton kernels need tensor cores for bfloat16, compute capability 8.0 or newer; this GPU has "
            f'{capability}. Use implementation="xla".'
        )
    if capability not in CARDS:
        raise NotImplementedError(
            f"the Triton kernels were compiled for compute capabilities {', '.join(CARDS)}; this GPU has {capability}. "
            f'Use implementation="xla".'
        )
    return CARDS[capability]


def plan_for(length: int, card: Card) -> Plan:
    """The shortest plan that holds a sequence.

    Raises:
      NotImplementedError: for a sequence too long for the card.

    Example:
      >>> plan_for(1025, CARDS["8.0"]).points
      2048
    """
    for plan in card.plans:
        if length <= plan.points:
            return plan
    raise NotImplementedError(
        f"the Triton kernels take sequences of at most {card.longest} steps on a GPU of compute capability "
        f"{card.capability}, which has {card.shared // 1024} KB of shared memory for a block; got {length}. Use "
        f'implementation="xla".'
    )


def _scale(size: int) -> float:
    return 2.0 ** -(size.bit_length() // 2)


def dft_tables(plan: Plan, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """F1, F2 and T of `tables` for any factors, each `(re | im, rows, columns)`."""
    n1, n2 = plan.n1, plan.n2
    k1, columns = np.arange(n1)[:, None] + 0.25, np.arange(n2)
    f1 = np.exp(-2j * np.pi * (k1 * np.arange(n1) / n1 % 1)) * _scale(n1)
    f2 = np.exp(-2j * np.pi * (np.outer(columns, columns) % n2 / n2)) * _scale(n2)
    twiddle = np.exp(-2j * np.pi * k1 * columns / plan.points)

    def planes(z):
        return jnp.asarray(np.stack([z.real, z.imag]), dtype)

    return planes(f1), planes(f2), planes(twiddle)


def tap_spectra(taps: jax.Array, plan: Plan) -> jax.Array:
    """The spectra of taps `(..., 1 or 2, n)` in float32, `(..., re | im, n1, n2)`: K = F(taps) + i F(taps ahead).

    Where there are two rows, the first has the taps at lags from -n: a step before the first is n later in the
    right-angle transform and comes back with a factor i.
    """
    n = plan.points
    lags = taps[..., -1, :] if taps.shape[-2] == 1 else jax.lax.complex(taps[..., 1, :], taps[..., 0, :])
    spectra = jnp.fft.fft(lags * twist(n)) / (n * plan.scale**2)
    spectra = spectra.reshape(*spectra.shape[:-1], plan.n2, plan.n1).swapaxes(-1, -2)
    return jnp.stack([spectra.real, spectra.imag], -3)


def tap_cotangent(d_spectra: jax.Array, taps: jax.Array, plan: Plan) -> jax.Array:
    """The cotangent of taps whose spectra have this one."""
    (d_taps,) = jax.vjp(lambda taps: tap_spectra(taps, plan), taps)[1](d_spectra)
    return d_taps
