"""The words of this library's signatures.

Axis glossary, the same in every file:

====  =============================================================
``B``  batch: any number of leading axes, none included (``*B``)
``L``  length of the sequence
``D``  features: each has its own kernel, none sees another
``C``  kernel channels: ``C`` kernels over the same ``D`` features
``K``  kernel taps
``N``  FFT size
====  =============================================================

The functional core takes ``(*B, D, L)``; Flax modules take ``(*B, L, D)``.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike as DTypeLike
from jaxtyping import Array, Float

type ArrayLike = jax.typing.ArrayLike | Sequence[Any]
"""What public functions take where they say array: checked by hand there, so that the message can be good."""

type Implementation = Literal["xla", "butterfly", "mosaic_gpu", "triton"]
"""Names of the ways to compute a long convolution."""

type Precision = str | jax.lax.Precision | None
"""What `jax.lax.Precision` accepts; ``None`` leaves the choice to the implementation."""

type Implementations = Implementation | Sequence[Implementation] | None

type KernelTransform = Callable[[Float[Array, "*C D K"]], Float[Array, "*C D K"]]
"""A pure function of the kernel, such as squash after smooth."""


def checked_by_hand[Function: Callable](function: Function) -> Function:
    """Exempts a public function from the type checks that tests turn on: its own messages are clearer than theirs."""
    function.__no_type_check__ = True  # type: ignore[attr-defined]
    return function


@runtime_checkable
class Backend(Protocol):
    """One implementation, called with arguments that are already validated and normalised.

    The kernel always has its channel axis. A post gate whose channel axis is 1 is shared by the channels.
    A request that is valid but not supported raises `NotImplementedError` with the reason.
    """

    def __call__(
        self,
        u: Float[Array, "*B D L"],
        kernel: Float[Array, "C D K"],
        skip: Float[Array, "C D"] | None,
        *,
        reverse_kernel: Float[Array, "C D K"] | None,
        circular: bool,
        pre_gate: Float[Array, "*B D L"] | None,
        post_gate: Float[Array, "*B #C D L"] | None,
        precision: jax.lax.Precision | None,
    ) -> Float[Array, "*B C D L"]:
        """The convolution, of u's dtype."""
        ...
