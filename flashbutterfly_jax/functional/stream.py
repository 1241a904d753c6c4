r"""Causal long convolution of a sequence that arrives step by step, as when a model generates it.

Step t of the tiled method adds up the few steps since the last multiple of a block's length directly. Everything before
comes in square tiles: where S is the largest power of two that divides t, what steps t - S .. t - 1 mean for steps
t .. t + S - 1 is one FFT product of 2 S points with the first 2 S taps. Each pair of steps lies in one tile: cut time
into blocks of S, for the largest S that separates them, and the tile is that of the later block. There are L / 2 S
tiles of S steps, so that L steps cost O(L log^2 L), and the largest tile is as far as the kernel reaches.

One buffer is enough: behind the current step it holds u, ahead of it the sums for y so far. It is a ring where it is
long enough for the whole kernel, and then the sequence may go on for ever.
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int

from flashbutterfly_jax.functional.arguments import floating, shaped
from flashbutterfly_jax.functional.spectral import irfft, rfft
from flashbutterfly_jax.functional.xla import next_fast_even
from flashbutterfly_jax.typing import ArrayLike, checked_by_hand

type Method = Literal["tiled", "direct"]
"""How what is further back than a block is added up: by tiles, or one step at a time."""

_METHODS: tuple[Method, ...] = get_args(Method.__value__)

# Steps that the tiled method adds up directly: below it an FFT costs more than the sum.
_BLOCK = 32

_LAST = jnp.iinfo(jnp.int32).max


class StreamState(NamedTuple):
    """What a stream remembers of the sequences of a batch: a pytree, donated or gathered like any other."""

    buffer: Float[Array, "*B C D R"]
    """Behind the current place u, in the first channel; from it on the sums for y so far."""
    place: Int[Array, ""]
    """Steps since the state began or was filled, which the tiles are counted from; goes round within 2 R."""
    position: Int[Array, ""]
    """Steps of the sequence so far; stops at the largest int32."""


@checked_by_hand
def long_conv_stream(
    kernel: Annotated[ArrayLike, "*C D K"],
    skip: Annotated[ArrayLike, "*C D"] | None = None,
    *,
    max_length: int | None = None,
    method: Method = "tiled",
) -> "LongConvStream":
    r"""Makes a kernel ready to convolve sequences that arrive step by step, exactly and causally.

    However a sequence is divided into a prompt, given to `LongConvStream.prefill`, and single steps, the results are
    those of `long_conv` to rounding. With the tiled method a step costs O(log^2 K) products on average, not O(K).

    Computes in float32, and in float64 where kernel or skip is; u may be narrower, and y has its dtype. Differentiable.

    **Memory.** R is the power of two from ``max_length``, or from 2 (K - 1) if that is less: a state has
    ``*B`` C D R numbers, and the stream about 3 C D R more, which the batch shares.

    Args:
      kernel: ``(D, K)``, or ``(C, D, K)`` for C kernels over the same u.
      skip: the weight of u itself, ``(D,)``, or ``(C, D)`` where the kernel has channels.
      max_length: steps of the longest sequence, its prompt included. None is any number of them, with all K taps.
      method: ``"tiled"``, or ``"direct"``, which keeps the last K steps and sums over all of them at every step: O(K)
        work for each, the usual way, here to compare with.

    Raises:
      ValueError: if an argument has a wrong shape, dtype or value.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flashbutterfly_jax import long_conv, long_conv_stream
      >>> u = jax.random.normal(jax.random.key(0), (2, 3, 100))
      >>> kernel = jax.random.normal(jax.random.key(1), (3, 100))
      >>> stream = long_conv_stream(kernel, max_length=100)
      >>> state, prompt = stream.prefill(u[..., :60])
      >>> step = jax.jit(stream.step, donate_argnums=0)
      >>> steps = []
      >>> for t in range(60, 100):
      ...     state, y_t = step(state, u[..., t])
      ...     steps.append(y_t)
      >>> y = jnp.concatenate([prompt, jnp.stack(steps, -1)], -1)
      >>> bool(jnp.allclose(y, long_conv(u, kernel), atol=1e-4))
      True
    """
    if method not in _METHODS:
        raise ValueError(f"method must be of {_METHODS}; got {method!r}.")
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"max_length must be a positive integer or None; got {max_length!r}.")
    kernel = floating("kernel", kernel)
    if kernel.ndim not in (2, 3) or not kernel.shape[-1]:
        raise ValueError(f"kernel must have shape (D, K) or (C, D, K) with K >= 1; got shape {kernel.shape}.")
    skip = shaped("skip", skip, kernel.shape[:-1], of="kernel without its taps")
    wide = any(x is not None and x.dtype == jnp.float64 for x in (kernel, skip))
    taps = kernel[..., :max_length].astype(jnp.float64 if wide else jnp.float32)
    if skip is not None:
        taps = taps.at[..., 0].add(skip.astype(taps.dtype))
    taps = taps.reshape(-1, *taps.shape[-2:])

    reach = _power_of_two(max(taps.shape[-1] - 1, _BLOCK))
    capacity = 2 * reach if max_length is None else min(2 * reach, _power_of_two(max(max_length, _BLOCK)))
    largest = min(reach, capacity // 2)
    block = min(reach, capacity) if method == "direct" else _BLOCK
    levels = range((largest // block).bit_length())
    latest, spectra = _prepare(taps, block, tuple(2 * block * 2**level for level in levels))
    return LongConvStream(
        taps=taps,
        latest=latest,
        spectra=spectra,
        max_length=max_length,
        capacity=capacity,
        has_channels=kernel.ndim == 3,
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _prepare(
    taps: Float[Array, "C D K"], block: int, points: tuple[int, ...]
) -> tuple[Float[Array, "C D 2*{block}"], tuple[Complex[Array, "C D _"], ...]]:
    """The taps of a block, reversed, and the spectra of the first taps for each number of points."""
    latest = _fit(jnp.flip(_fit(taps, block), -1), 2 * block)
    spectra: list[Array] = []
    for n in points:
        first = _fit(taps, n)
        if spectra:  # one after the other: FFTs that are free to start at once can hang on a CPU
            first = first + 0 * spectra[-1][..., :1].real
        spectra += rfft(first, n=n)
    return latest, tuple(spectra)


def _power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


def _fit(taps: Float[Array, "C D _"], length: int) -> Float[Array, "C D {length}"]:
    """The first ones, or all and zeros."""
    taps = taps[..., :length]
    return jnp.pad(taps, ((0, 0), (0, 0), (0, length - taps.shape[-1])))


@typing.no_type_check  # a pytree is made anew of shapes, shardings and the like
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LongConvStream:
    """A kernel made ready for streaming, from `long_conv_stream`: a pytree of arrays, which states are not part of.

    The state that a method takes is not changed, and may be donated.
    """

    taps: Float[Array, "C D K"]
    """As many as reach a step, the skip included."""
    latest: Float[Array, "C D _"]
    """The taps of a block, last lag first, and zeros for what lies ahead."""
    spectra: tuple[Complex[Array, "C D _"], ...]
    """Of the first 2 S taps, for every S of a tile from the block's length on."""
    max_length: int | None = dataclasses.field(metadata={"static": True})
    """Steps that a state has room for; None is any number."""
    capacity: int = dataclasses.field(metadata={"static": True})
    """R, the buffer's length: a power of two."""
    has_channels: bool = dataclasses.field(metadata={"static": True})
    """Whether the kernel has a channel axis, and so y."""

    @checked_by_hand
    def init(self, batch_shape: Sequence[int] = ()) -> StreamState:
        """The state of sequences that have not begun.

        Args:
          batch_shape: ``*B``.
        """
        buffer = jnp.zeros((*batch_shape, *self.taps.shape[:-1], self.capacity), self.taps.dtype)
        return StreamState(buffer, jnp.int32(0), jnp.int32(0))

    @checked_by_hand
    def prefill(self, u: Annotated[ArrayLike, "*B D L"]) -> tuple[StreamState, Float[Array, "*BC D L"]]:
        """Begins sequences with several steps at once, by one FFT convolution.

        Returns:
          the state after them, and y, of u's dtype: ``(*B, D, L)``, or ``(*B, C, D, L)`` where the kernel has channels.

        Raises:
          ValueError: if u has a wrong shape or dtype, or more steps than there is room for.
        """
        u = floating("u", u)
        features = self.taps.shape[-2]
        if u.ndim < 2 or u.shape[-2] != features:
            raise ValueError(f"u must have shape (*B, D, L) with D = {features} as in kernel; got shape {u.shape}.")
        self._check_dtype("u", u)
        *batch, _, length = u.shape
        self._check_room(0, length)
        state = self.init(batch)
        if not length:
            return state, self._result(jnp.zeros((*state.buffer.shape[:-1], 0), u.dtype), u)
        n = next_fast_even(length + self.taps.shape[-1] - 1)
        spectrum, kernel_spectrum = rfft(u.astype(self.taps.dtype), self.taps, n=n)
        (y,) = irfft(spectrum[..., None, :, :] * kernel_spectrum, n=n)
        # What the prompt means for the steps to come is all there: tiles are counted from its end.
        ahead = y[..., length : length + min(self.capacity, self.taps.shape[-1] - 1)]
        state = state._replace(
            buffer=state.buffer.at[..., : ahead.shape[-1]].set(ahead), position=jnp.int32(min(length, _LAST))
        )
        return state, self._result(y[..., :length], u)

    @checked_by_hand
    def step(self, state: StreamState, u_t: Annotated[ArrayLike, "*B D"]) -> tuple[StreamState, Float[Array, "*BC D"]]:
        """Takes one more step of each sequence: O(log^2 K) work on average, and one program for all of them.

        The work of a step is uneven: every S steps there is an FFT of 2 S points. Where there is no room for the step,
        y is NaN; an error is raised if that is known, which it is not inside `jax.jit`.

        Args:
          state: from `init`, `prefill` or a step before.
          u_t: ``(*B, D)``.

        Returns:
          the state after it, and y_t, of u_t's dtype: ``(*B, D)``, or ``(*B, C, D)`` where the kernel has channels.

        Raises:
          ValueError: if u_t has a wrong shape or dtype, the state is of another stream or is full.
        """
        self._check_state(state)
        u_t = floating("u_t", u_t)
        batch = state.buffer.shape[:-3]
        expected = (*batch, self.taps.shape[-2])
        if u_t.shape != expected:
            raise ValueError(f"u_t must have shape {expected}, (*B, D) of the state; got shape {u_t.shape}.")
        self._check_dtype("u_t", u_t)
        if not isinstance(state.position, jax.core.Tracer):
            self._check_room(int(state.position), 1)

        buffer = self._add_tile(state.buffer, state.place)
        slot = state.place % self.capacity
        block = self._block
        since = slot % block
        # The block's earlier steps, this one, and nothing of those ahead, where the buffer holds other things.
        recent = jax.lax.dynamic_slice_in_dim(buffer[..., 0, :, :], slot - since, block, -1)
        recent = jnp.where(jnp.arange(block) == since, u_t[..., None].astype(buffer.dtype), recent)
        recent = jnp.where(jnp.arange(block) <= since, recent, 0)
        weights = jax.lax.dynamic_slice_in_dim(self.latest, block - 1 - since, block, -1)
        sums = jax.lax.dynamic_index_in_dim(buffer, slot, -1, keepdims=False)
        y_t = sums + (recent[..., None, :, :] * weights).sum(-1)
        if self.max_length is not None:
            y_t = jnp.where(state.position < self.max_length, y_t, jnp.nan)
        # Before the write, or else XLA fuses it with the sum and copies the whole buffer for it.
        y_t, buffer = jax.lax.optimization_barrier((y_t, buffer))
        column = u_t.astype(buffer.dtype)[..., None, :, None]
        buffer = jax.lax.dynamic_update_slice_in_dim(buffer, column, slot, -1)
        # Never back to 0, where no tile ends; every multiple of R is like every other.
        place = jnp.where(state.place == 2 * self.capacity - 1, self.capacity, state.place + 1)
        position = state.position + (state.position < _LAST)
        return StreamState(buffer, place, position), self._result(y_t, u_t)

    @property
    def _block(self) -> int:
        return self.latest.shape[-1] // 2

    def _add_tile(self, buffer: Float[Array, "*B C D R"], place: Int[Array, ""]) -> Float[Array, "*B C D R"]:
        """The sums ahead, with what the tile that ends here has for them.

        Done before y is read and not after, so that the FFTs of a stack of layers wait for one another.
        """
        zeros = jax.lax.population_count((place & -place) - 1)  # at the end of the binary number
        which = jnp.clip(zeros - self._block.bit_length() + 2, 0, len(self.spectra))
        branches = [lambda buffer, _: buffer, *map(self._tile, range(len(self.spectra)))]
        return jax.lax.switch(jnp.where(place == 0, 0, which), branches, buffer, place)

    def _tile(self, level: int):
        spectrum, steps = self.spectra[level], self._block * 2**level
        # In a ring the largest tile finds the places ahead full of old steps; no other tile has come before it there.
        first = self._is_ring and level == len(self.spectra) - 1

        def add(buffer: Array, place: Array) -> Array:
            start = (
                place % self.capacity
            )  # a multiple of the tile's steps, as the capacity is: nothing goes over the end
            u = jax.lax.dynamic_slice_in_dim(buffer[..., 0, :, :], (place - steps) % self.capacity, steps, -1)
            (u_spectrum,) = rfft(u, n=2 * steps)
            (y,) = irfft(u_spectrum[..., None, :, :] * spectrum, n=2 * steps)
            sums = y[..., steps:]
            if not first:
                sums = sums + jax.lax.dynamic_slice_in_dim(buffer, start, steps, -1)
            return jax.lax.dynamic_update_slice_in_dim(buffer, sums, start, -1)

        return add

    @property
    def _is_ring(self) -> bool:
        """Whether the largest tile is as far as the kernel reaches, so that two of them are all that is remembered."""
        return self.taps.shape[-1] - 1 <= self.capacity // 2

    def _result(self, y: Array, u: Array) -> Array:
        y = y.astype(u.dtype)
        return y if self.has_channels else y.reshape(u.shape)

    def _check_dtype(self, name: str, u: Array) -> None:
        if jnp.promote_types(u.dtype, self.taps.dtype) != self.taps.dtype:
            raise ValueError(
                f"{name} must be no wider than {self.taps.dtype}, in which this stream computes; got {u.dtype}. "
                f"Make the stream from a kernel of {u.dtype}."
            )

    def _check_room(self, position: int, steps: int) -> None:
        if self.max_length is not None and position + steps > self.max_length:
            raise ValueError(
                f"max_length = {self.max_length} steps have no room for {steps} more after {position}; make the stream "
                f"with max_length of at least {position + steps}."
            )

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, StreamState):
            raise ValueError(f"state must be that of `init`, `prefill` or a step before; got {type(state).__name__}.")
        expected = (*self.taps.shape[:-1], self.capacity)
        if state.buffer.shape[-3:] != expected or state.buffer.dtype != self.taps.dtype:
            raise ValueError(
                f"state must be of this stream, with a buffer of shape (*B, C, D, R), (C, D, R) = {expected}, and "
                f"dtype {self.taps.dtype}; got shape {state.buffer.shape}, dtype {state.buffer.dtype}, of another one."
            )
