"""What the Triton kernels are cut up into, the cards that they are for, and the tables that they read.

Cards differ in shared memory and in how they multiply: `HMMA` on 8.x and 12.0 takes its operands from registers, of
which a thread has 255 and each warp needs its own copy of a right operand; `HGMMA` on 9.0 and `UTCHMMA` on 10.0 read
shared memory. Each of the two kinds has its kernels and its plans. What the compiler makes of each plan on each card is
committed beside the tests, which check `Plan.shared` with it.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fft_conv.tables import twist


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a convolution is cut up, for either kind of tensor core.

    Attributes:
      n1, n2: the DFT factors; the transform has n1 n2 points.
      warps: of a program of `convolve`.
      shared: bytes of shared memory that no kernel of this plan needs more of, on any card.
      chunk: columns of F2 that are there at once.
      block, columns: k1 and k2 that a program makes of a cotangent of the spectra alone.
      stages: turns of a loop of `convolve`, for one of which it loads while it works on another.

    Raises:
      ValueError: for sizes that no kernel has.
    """

    n1: int
    n2: int
    warps: int
    shared: int
    chunk: int
    block: int
    columns: int
    stages: int = 1

    module: ClassVar[str]
    """Where its kernels are."""

    def __post_init__(self):
        for name, least in (
            ("n1", 64),
            ("n2", 16),
            ("warps", 4),
            ("block", 32),
            ("chunk", 16),
            ("columns", 16),
            ("stages", 1),
        ):
            self._check(name, least)
        if self.block > self.n1:
            raise ValueError(f"block must be at most n1, {self.n1}; got {self.block}.")
        if self.chunk > min(self.n1, self.n2):
            raise ValueError(f"chunk must be at most n1 and n2, {self.n1} and {self.n2}; got {self.chunk}.")
        if self.columns > self.n2:
            raise ValueError(f"columns must be at most n2, {self.n2}; got {self.columns}.")

    def _check(self, name: str, least: int):
        value = getattr(self, name)
        if value < least or (name != "stages" and value & (value - 1)):
            raise ValueError(f"{name} must be a power of two from {least}; got {value}.")

    @property
    def points(self) -> int:
        """The transform's complex points; the longest sequence it convolves."""
        return self.n1 * self.n2

    @property
    def scale(self) -> float:
        """What both blocks together multiply a spectrum by."""
        return _scale(self.n1) * _scale(self.n2)

    def rows_of_program(self, kernel: str, batch: int, spectra: int) -> int:
        """Rows of the batch that a program of a kernel takes, where there are so many spectra or pieces of them."""
        raise NotImplementedError

    def warps_of(self, kernel: str, constants: dict[str, Any], itemsize: int) -> int:
        """Of a program of the kernel with these constants, for sequences of numbers of so many bytes."""
        raise NotImplementedError

    def stages_of(self, kernel: str) -> int:
        """Of the loop of a kernel."""
        return self.stages if kernel == "convolve" else 1

    def constants(self, kernel: str, constants: dict[str, Any], itemsize: int) -> dict[str, int]:
        """What a kernel with these constants is compiled for of a plan, likewise."""
        raise NotImplementedError

    def tables(self) -> list[np.ndarray]:
        """Operands that every kernel takes, in float64."""
        raise NotImplementedError

    def blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """F1 (k1, n1), F2 (n2, k2) and T (k1, n2) of `tables`, complex, for any factors."""
        n1, n2 = self.n1, self.n2
        k1, columns = np.arange(n1)[:, None] + 0.25, np.arange(n2)
        f1 = np.exp(-2j * np.pi * (k1 * np.arange(n1) / n1 % 1)) * _scale(n1)
        f2 = np.exp(-2j * np.pi * (np.outer(columns, columns) % n2 / n2)) * _scale(n2)
        return f1, f2, np.exp(-2j * np.pi * k1 * columns / self.points)

    def spectra(self, taps: jax.Array) -> jax.Array:
        """Those of taps `(..., 1 or 2, n)`, in float32 and as the kernels read them: K = F(taps) + i F(taps ahead).

        Where there are two rows, the first has the taps at lags from -n: a step before the first is n later in the
        right-angle transform and comes back with a factor i.
        """
        n = self.points
        lags = taps[..., -1, :] if taps.shape[-2] == 1 else jax.lax.complex(taps[..., 1, :], taps[..., 0, :])
        spectra = jnp.fft.fft(lags * twist(n)) / (n * self.scale**2)
        spectra = spectra.reshape(*spectra.shape[:-1], self.n2, self.n1).swapaxes(-1, -2)
        return jnp.stack([spectra.real, spectra.imag], self.axis_of_parts)

    axis_of_parts: ClassVar[int]
    """Of the real and the imaginary part of a spectrum."""

    def cotangent_of_taps(self, d_spectra: jax.Array, taps: jax.Array) -> jax.Array:
        """The cotangent of taps whose spectra have this one."""
        (d_taps,) = jax.vjp(self.spectra, taps)[1](d_spectra)
        return d_taps


def _scale(size: int) -> float:
    return 2.0 ** -(size.bit_length() // 2)


def _planes(z: np.ndarray) -> np.ndarray:
    return np.stack([z.real, z.imag])


@dataclasses.dataclass(frozen=True)
class RegisterPlan(Plan):
    """A plan of the kernels in `triton_registers`.

    Attributes:
      rows: of the batch, side by side in a tile of n1 x (rows n2) numbers.

    Example:
      >>> [table.shape for table in MMA_PLANS[0].tables()]
      [(2, 64, 64), (2, 16, 16), (2, 64, 16)]
    """

    rows: int = 1

    module = "pallas_kernels.fft_conv.triton_registers"
    axis_of_parts = -3

    def __post_init__(self):
        super().__post_init__()
        self._check("rows", 1)

    def rows_of_program(self, kernel: str, batch: int, spectra: int) -> int:
        return self.rows

    def warps_of(self, kernel: str, constants: dict[str, Any], itemsize: int) -> int:
        return 4 if kernel == "correlate" else self.warps

    def constants(self, kernel: str, constants: dict[str, Any], itemsize: int) -> dict[str, int]:
        found = {"N1": self.n1, "N2": self.n2}
        if kernel == "correlate":
            return found | {"BLOCK": self.block, "CHUNK": self.columns, "SUM_CHUNK": self.chunk}
        return found | {"CHUNK": self.chunk}

    def tables(self) -> list[np.ndarray]:
        """F1, F2 and T, each `(re | im, rows, columns)`."""
        return [_planes(z) for z in self.blocks()]


@dataclasses.dataclass(frozen=True)
class SharedPlan(Plan):
    """A plan of the kernels in `triton_shared`.

    Attributes:
      together: whether one launch makes the cotangents of sequences and of spectra; otherwise registers do not suffice.
      keep: whether `convolve` keeps twiddle and taps in registers.
      rows, rows_back: of the batch that a program of `convolve` and of `backward` takes at most, one after the other.
      warps_back: of a program of `backward` that has registers to spare; others have 8.
      least_chunk: the chunk where registers are short.
      anew: bytes of a number from which on `convolve` computes addresses anew for each row, where registers are short.
      packed: whether `backward` rounds X before it makes H, for which there are too few registers otherwise.

    Example:
      >>> [table.shape for table in WGMMA_PLANS[0].tables()]
      [(128, 64), (64, 128), (32, 32), (64, 16, 2)]
    """

    together: bool = False
    keep: bool = False
    rows: int = 16
    rows_back: int = 16
    warps_back: int = 4
    least_chunk: int = 64
    anew: int = 8
    packed: bool = False

    module = "pallas_kernels.fft_conv.triton_shared"
    axis_of_parts = -1

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("rows", 1), ("rows_back", 1), ("warps_back", 4), ("least_chunk", 16)):
            self._check(name, least)
        if self.packed and self.together:
            raise ValueError("packed must be False where together is True, for n2 is in another order then; got True.")

    def rows_of_program(self, kernel: str, batch: int, spectra: int) -> int:
        most = min(self.rows_back if kernel == "backward" else self.rows, max(1, batch * spectra // _PROGRAMS))
        return max(1, -(-batch // max(1, -(-batch // most))))  # shared out evenly

    def _light(self, constants: dict[str, Any], itemsize: int) -> bool:
        """Whether rows are read 16 bytes at a time, in two bytes a number: few registers then hold addresses and rows.

        Short transforms have registers for both.
        """
        return self.together or (itemsize == 2 and constants["LENGTH"] % 8 == 0)

    def warps_of(self, kernel: str, constants: dict[str, Any], itemsize: int) -> int:
        if kernel == "convolve":
            return self.warps
        gated = constants["FACTOR_CHANNELS"] > 0 or constants["GATE_CHANNELS"] > 0
        return self.warps_back if self._light(constants, itemsize) and not gated else 8

    def constants(self, kernel: str, constants: dict[str, Any], itemsize: int) -> dict[str, int]:
        found = {"N1": self.n1, "N2": self.n2}
        if kernel == "convolve":
            light = self._light(constants, itemsize)
            chunk = self.chunk if light else min(self.chunk, self.least_chunk)
            anew = itemsize >= self.anew and not light
            return found | {"CHUNK": chunk, "KEEP": int(self.keep), "ANEW": int(anew)}
        return found | {"BLOCK": self.block, "COLUMNS": self.columns, "PACKED": int(self.packed)}

    def tables(self) -> list[np.ndarray]:
        """F1 `(re | im k1, n1)`, its transpose for the way back `(n1, re | -im k1)`, F2 in real form and T in pairs."""
        f1, f2, twiddle = self.blocks()
        rows = np.stack([np.stack([f2.real, f2.imag], -1), np.stack([-f2.imag, f2.real], -1)], 1)
        return [
            np.concatenate([f1.real, f1.imag]),
            np.concatenate([f1.real.T, -f1.imag.T], 1),
            rows.reshape(2 * self.n2, 2 * self.n2),
            np.stack([twiddle.real, twiddle.imag], -1),
        ]


_PROGRAMS = 1536
"""As few as were measured to keep an H100 busy: where there are fewer, programs take fewer rows."""


MMA_PLANS = (
    RegisterPlan(64, 16, 4, 24 * 1024, chunk=16, block=64, columns=16, stages=2, rows=2),
    RegisterPlan(64, 32, 4, 24 * 1024, chunk=32, block=64, columns=16),
    RegisterPlan(64, 64, 4, 40 * 1024, chunk=16, block=32, columns=16),
    RegisterPlan(128, 64, 8, 72 * 1024, chunk=16, block=32, columns=16),
)
"""For products of operands in registers; shortest first, like the others."""

WGMMA_PLANS = (
    SharedPlan(64, 16, 4, 56 * 1024, chunk=16, block=64, columns=16, stages=3, together=True, keep=True, rows_back=32),
    SharedPlan(64, 32, 4, 56 * 1024, chunk=32, block=64, columns=32, together=True, rows=32, rows_back=32),
    SharedPlan(64, 64, 4, 96 * 1024, chunk=64, block=64, columns=64, rows=8, anew=4),
    SharedPlan(128, 64, 8, 208 * 1024, chunk=64, block=64, columns=64, rows=32, least_chunk=32, packed=True),
)
"""For 9.0: of several of each length, those that were the fastest on an H100; `anew` and `packed` came later."""

TCGEN05_PLANS = (
    SharedPlan(64, 16, 4, 48 * 1024, chunk=16, block=64, columns=16, together=True),
    SharedPlan(64, 32, 8, 56 * 1024, chunk=32, block=64, columns=32, together=True, warps_back=8),
    SharedPlan(64, 64, 8, 96 * 1024, chunk=32, block=64, columns=64, warps_back=8, packed=True),
    SharedPlan(64, 128, 8, 136 * 1024, chunk=64, block=64, columns=32, warps_back=8, least_chunk=32, anew=2),
)
"""For 10.0."""


@dataclasses.dataclass(frozen=True)
class Card:
    """A kind of GPU: its compute capability, the bytes of shared memory that one block may use, and all its plans."""

    capability: str
    shared: int
    all_plans: tuple[Plan, ...] = MMA_PLANS

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Those for which it has the shared memory."""
        return tuple(plan for plan in self.all_plans if plan.shared <= self.shared)

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
        Card("9.0", 227 * 1024, WGMMA_PLANS),  # H100, H200
        Card("10.0", 227 * 1024, TCGEN05_PLANS),  # B200
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
