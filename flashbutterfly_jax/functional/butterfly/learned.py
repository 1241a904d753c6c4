r"""The learned butterfly: a long convolution whose DFT blocks are parameters (Fu et al. 2023).

With M and M' butterfly transforms of u and of the taps, V one back, all with fixed twiddles,

.. math:: y = \operatorname{Re} V \,(M' k \circ M u)

is the convolution where M = M' = F and V is the inverse of F, and so it starts. As soon as the blocks leave the DFT it
is another linear map of u, and **no longer causal**: an output then depends on the whole sequence, later steps too.
That suits classifiers. The causal form keeps the past to itself whatever the blocks are.

In the causal form sequences are cut into blocks of P steps, x_0, x_1, ..., and taps likewise, k_0, k_1, ... In the
right-angle transform of P points, a step before the first comes back with a factor i, so the convolution is

.. math::
    y_j = \operatorname{Re} F^{-1} (F k_0 \circ F x_j)
        + \operatorname{Re} V \sum_{l=1}^{j} (M' k_l + i M' k_{l-1}) \circ M x_{j-l}.

The first term is a causal convolution and has no parameter but its taps; the second, where everything is learned,
brings a block to the later ones alone. Of the L (L + 1) / 2 entries that a causal map has, a fraction near 1 - P / L is
the learned part's. It depends on the distance between blocks only, so that a sequence may have any length, and what a
block brings to the others is known once it is over, as a stream needs it.

A transform of the taps alone, k' = M' k, would be causal for any blocks as well; but y = k' * u is then a convolution
with L taps, which a kernel learned directly can be without it, and L^2 / 2 entries stay bound to L numbers. Learned
blocks of ever larger size along a binary tree would be free down to the smallest, for log L times the transforms, and
need as many sets of parameters as sizes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact, PRNGKeyArray

from flashbutterfly_jax.functional.arguments import floating, shaped
from flashbutterfly_jax.functional.butterfly.blocks import Blocks, block_shapes, init_blocks, stage_blocks
from flashbutterfly_jax.functional.butterfly.convolution import RIGHT_ANGLE
from flashbutterfly_jax.functional.butterfly.plans import MAX_ORDER, Plan
from flashbutterfly_jax.functional.butterfly.transform import forward, forward_stage, inverse
from flashbutterfly_jax.functional.long_conv import _resolve
from flashbutterfly_jax.typing import (
    ArrayLike,
    DTypeLike,
    Implementation,
    Implementations,
    Precision,
    checked_by_hand,
)

type Form = Literal["causal", "right_angle", "padded"]

LARGEST_FACTOR = 16  # of the authors' code
CAUSAL_BLOCKS = 8
"""Into which the causal form cuts a sequence, unless its factors say otherwise."""


@dataclasses.dataclass(frozen=True)
class LearnedButterfly:
    """Which blocks of a long convolution are learned, and in which form.

    Each transform has reals 2 H (n_1^2 + n_2^2 + ...), over its different factors, or over all per stage; H is 1, or D
    per feature. The authors' code keeps the sizes 2, 4, 8 and 16 whatever the length, 680 H for each of its two
    transforms, of which a plan of 16, 8, 4 and 2 needs all.

    Attributes:
      form: ``"causal"`` never looks ahead: the default, and the only form for a model that predicts the next step.
        ``"right_angle"`` and ``"padded"`` are causal at initialisation **and look ahead once trained**; the first
        transforms the L points, the second, the authors', 2 L of them.
      factors: of the transform; their product is at least L, 2 L where padded, or the steps of a causal block. None
        takes 16 as often as it goes, and an eighth of the length for a causal block.
      per_stage: a block for each stage, not for each size.
      per_feature: blocks of each feature, not of all.
      learn_inverse: the blocks on the way back too; the authors' code came to leave them fixed.
      offset_scale: None learns the blocks, from the DFT on. A number learns offsets to the fixed DFT, from
        N(0, offset_scale^2) on; 0.01 in the authors' code.
      activation: elementwise function between the stages of the learned transforms, on real and imaginary parts alike;
        None is linear, as by default in the authors' code. Only then is it the convolution at first.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> LearnedButterfly().plan(1024), LearnedButterfly("padded").plan(1024)
      (Plan(factors=(16, 8)), Plan(factors=(16, 16, 8)))
    """

    form: Form = "causal"
    factors: tuple[int, ...] | None = None
    per_stage: bool = False
    per_feature: bool = False
    learn_inverse: bool = False
    offset_scale: float | None = None
    activation: Callable[[Array], Array] | None = None

    def __post_init__(self) -> None:
        if self.form not in get_args(Form.__value__):
            raise ValueError(f"form must be one of {get_args(Form.__value__)}; got {self.form!r}.")
        if self.factors is not None:
            Plan(self.factors)
        if self.offset_scale is not None and not self.offset_scale >= 0:
            raise ValueError(f"offset_scale must be None or >= 0; got {self.offset_scale!r}.")

    @property
    def causal(self) -> bool:
        """Whether no block can make an output depend on a later input."""
        return self.form == "causal"

    @property
    def transforms(self) -> tuple[str, ...]:
        """Those that are learned."""
        return ("input", "kernel", "output") if self.learn_inverse else ("input", "kernel")

    def plan(self, taps: int) -> Plan:
        """The factors for kernels of so many taps.

        Raises:
          ValueError: the factors given have too few points, or there are more than four of 16.
        """
        least = {"causal": 1, "right_angle": taps, "padded": 2 * taps}[self.form]
        if self.factors is None:
            return _sixteens(-(-taps // CAUSAL_BLOCKS) if self.causal else least)
        plan = Plan(self.factors)
        if plan.n < least:
            raise ValueError(
                f"factors must have a product of at least {least} for {taps} taps in the form {self.form!r}; "
                f"got {self.factors}, whose product is {plan.n}."
            )
        return plan

    def init(self, key: PRNGKeyArray, features: int, taps: int, dtype: DTypeLike = jnp.float32) -> dict[str, Blocks]:
        """New blocks: of ``input`` and ``kernel``, the transforms of u and of the taps, and of ``output`` if learned.

        Example:
          >>> tree = LearnedButterfly("right_angle").init(jax.random.key(0), features=4, taps=32)
          >>> jax.tree.map(jnp.shape, tree["kernel"]), sorted(tree)
          ({'size_16': (1, 16, 16, 2), 'size_2': (1, 2, 2, 2)}, ['input', 'kernel'])
        """
        names = self.transforms
        return {
            name: init_blocks(
                one_key,
                self.plan(taps),
                copies=features if self.per_feature else 1,
                per_stage=self.per_stage,
                offset_scale=self.offset_scale,
                inverse=name == "output",
                dtype=dtype,
            )
            for name, one_key in zip(names, jax.random.split(key, len(names)), strict=True)
        }


@checked_by_hand
def learned_long_conv(
    u: Annotated[ArrayLike, "*B D L"],
    kernel: Annotated[ArrayLike, "*C D K"],
    skip: Annotated[ArrayLike, "*C D"] | None = None,
    *,
    blocks: dict[str, Blocks],
    butterfly: LearnedButterfly,
    reverse_kernel: Annotated[ArrayLike, "*C D K"] | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*BC D L"]:
    """`long_conv` with learned blocks; with new ones, its equal to rounding.

    **Not causal once trained**, unless ``butterfly.form`` is ``"causal"``. The skip is added outside of the transforms.
    ``"butterfly"`` computes in float32, or in float64 where any argument is float64; ``"mosaic_gpu"`` multiplies in the
    16 bits of u with float32 sums. The result has the dtype of u.

    Args:
      u: ``(*B, D, L)``; L is at most the plan's points, half of them where padded, and any in the causal form.
      kernel: ``(D, K)``, or ``(C, D, K)`` for C kernels; K decides the plan.
      skip: ``(D,)`` or ``(C, D)``, the weight of u itself.
      blocks: of `LearnedButterfly.init`, for D features and K taps.
      butterfly: what they are blocks of.
      reverse_kernel: taps of the lags -1, -2, ..., of the kernel's shape; none in the causal form.
      precision: of the matrix products of ``"butterfly"``; None is the highest.
      implementation: ``"butterfly"``, which None means, takes every request. ``"mosaic_gpu"`` are fused kernels for
        Hopper GPUs: a 16-bit u, the right angle with the factors 64 and 16, 32 or 64, or in three passes m, 64 and 64
        with m from 2 to 128, which are 8,192 to 524,288 points; no activation, blocks that features share, no reverse
        kernel; they have first derivatives. Of a sequence of names the first that supports the request runs, and on
        another device than the kernels' the next one.

    Raises:
      ValueError: if an argument has a wrong shape, dtype or value.
      NotImplementedError: if the request is valid, but no implementation named supports it.

    Example:
      >>> from flashbutterfly_jax import long_conv
      >>> butterfly = LearnedButterfly("right_angle")
      >>> blocks = butterfly.init(jax.random.key(0), features=1, taps=4)
      >>> u, kernel = jnp.array([[1.0, 1.0, 0.0, 2.0]]), jnp.array([[4.0, 3.0, 0.0, 0.0]])
      >>> learned_long_conv(u, kernel, blocks=blocks, butterfly=butterfly).round(4)
      Array([[4., 7., 3., 8.]], dtype=float32)
    """
    u, kernel = floating("u", u), floating("kernel", kernel)
    if u.ndim < 2:
        raise ValueError(f"u must have shape (*B, D, L), at least two axes; got shape {u.shape}.")
    if kernel.ndim not in (2, 3) or kernel.shape[-2] != u.shape[-2] or kernel.shape[-1] < 1:
        raise ValueError(
            f"kernel must have shape (D, K) or (C, D, K) with K >= 1 and D = {u.shape[-2]} as in u of shape {u.shape}; "
            f"got shape {kernel.shape}."
        )
    skip = shaped("skip", skip, kernel.shape[:-1], of="kernel without its taps")
    reverse_kernel = shaped("reverse_kernel", reverse_kernel, kernel.shape, of="kernel")
    if butterfly.causal and reverse_kernel is not None:
        raise ValueError(
            "reverse_kernel looks ahead and must be None in the causal form; use another form of butterfly."
        )
    plan = butterfly.plan(kernel.shape[-1])
    longest = {"causal": u.shape[-1], "right_angle": plan.n, "padded": plan.n // 2}[butterfly.form]
    if u.shape[-1] > longest:
        raise ValueError(
            f"u must have at most {longest} steps for {plan} in the form {butterfly.form!r}; got {u.shape[-1]}."
        )
    blocks = {
        name: {stage: floating("blocks", block) for stage, block in tree.items()} for name, tree in blocks.items()
    }
    _check_blocks(blocks, butterfly, plan, u.shape[-2])

    names = ("butterfly",) if implementation is None else _resolve(implementation)
    return _run(names, u, kernel, skip, reverse_kernel, blocks, butterfly, plan, precision)


def _run(names: tuple[Implementation, ...], *arguments) -> Array:
    """The result of the first implementation that supports the request."""
    reasons = []
    for position, name in enumerate(names, 1):
        rest = functools.partial(_run, names[position:]) if names[position:] else None
        try:
            if name == "butterfly":
                return _convolve(*arguments)
            if name == "mosaic_gpu":
                return _fused(rest, *arguments)
            raise NotImplementedError(
                'learned blocks need implementation="butterfly" or "mosaic_gpu", or None, as no other multiplies by '
                f"them; got {name!r}."
            )
        except NotImplementedError as reason:
            if len(names) == 1:
                raise
            reasons.append(f"{name!r}: {reason}")
    raise NotImplementedError("No implementation named supports this request. " + " ".join(reasons))


def _fused(rest: Callable[..., Array] | None, u, kernel, skip, reverse_kernel, blocks, *static) -> Array:
    """By the fused kernel where it is lowered for CUDA; elsewhere by the rest of the order, if there is any."""
    from flashbutterfly_jax.functional.butterfly import mosaic_gpu  # not above: it imports this module

    butterfly, plan, _ = static
    mosaic_gpu.check_supported(u, reverse_kernel, butterfly, plan)
    arrays = u, kernel, skip, blocks
    if rest is None:
        return mosaic_gpu.with_channels_and_skip(*arrays, butterfly)
    return jax.lax.platform_dependent(
        *arrays,
        cuda=functools.partial(mosaic_gpu.with_channels_and_skip, butterfly=butterfly),
        default=lambda u, kernel, skip, blocks: rest(u, kernel, skip, reverse_kernel, blocks, *static),
    )


@functools.partial(jax.jit, static_argnames=("butterfly", "plan", "precision"))
def _convolve(
    u: Float[Array, "*B D L"],
    kernel: Float[Array, "*C D K"],
    skip: Float[Array, "*C D"] | None,
    reverse_kernel: Float[Array, "*C D K"] | None,
    blocks: dict[str, Blocks],
    butterfly: LearnedButterfly,
    plan: Plan,
    precision: Precision,
) -> Float[Array, "..."]:
    arrays = (u, kernel, skip, reverse_kernel, blocks)
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in jax.tree.leaves(arrays)) else jnp.float32
    x, taps, weight, ahead, blocks = jax.tree.map(lambda x: x.astype(dtype), arrays)
    learned = _Learned(plan, butterfly, blocks, precision)
    y = _causal(learned, x, taps) if butterfly.causal else _free(learned, x, taps, ahead)
    if weight is not None:
        y = y + weight[..., None] * (x if taps.ndim == 2 else x[..., None, :, :])
    return y.astype(u.dtype)


@dataclasses.dataclass(frozen=True)
class _Learned:
    """The learned transforms of rows whose axis of features has ``inner`` axes between it and the points."""

    plan: Plan
    butterfly: LearnedButterfly
    blocks: dict[str, Blocks]
    precision: Precision

    @property
    def shift(self) -> float:
        return 0.0 if self.butterfly.form == "padded" else RIGHT_ANGLE

    def transform(self, name: str, rows: Inexact[Array, "*rows _"], inner: int = 0) -> Complex[Array, "..."]:
        rows = _pad(rows, self.plan.n)
        blocks = self._stages(name, inner)
        if self.butterfly.activation is None:
            return forward(rows, self.plan, self.shift, blocks=blocks, precision=self.precision)
        x = rows.reshape(*rows.shape[:-1], *self.plan.factors)
        for i, block in enumerate(blocks):
            if i:
                x = jax.lax.complex(self.butterfly.activation(x.real), self.butterfly.activation(x.imag))
            x = forward_stage(x, self.plan, i, block, self.shift, precision=self.precision)
        return x

    def back(self, spectrum: Complex[Array, "..."], inner: int = 0) -> Float[Array, "..."]:
        blocks = self._stages("output", inner) if self.butterfly.learn_inverse else None
        return inverse(spectrum, self.plan, self.shift, real=True, blocks=blocks, precision=self.precision)

    def _stages(self, name: str, inner: int) -> list[Complex[Array, "..."]]:
        stages = stage_blocks(
            self.blocks[name],
            self.plan,
            self.shift,
            offset_scale=self.butterfly.offset_scale,
            inverse=name == "output",
        )
        return [jnp.expand_dims(m, tuple(range(1, 1 + inner))) if m.ndim == 3 else m for m in stages]


def _free(
    learned: _Learned, u: Float[Array, "*B D L"], kernel: Float[Array, "*C D K"], ahead: Float[Array, "*C D K"] | None
) -> Float[Array, "..."]:
    """One transform for the whole sequence; a tap of lag -m sits at index n - m, times i at a right angle."""
    row: Inexact[Array, ...] = _pad(kernel, learned.plan.n)
    if ahead is not None:
        ahead = ahead[..., : learned.plan.n - 1]
        placed = jnp.flip(_pad(ahead, learned.plan.n), -1)
        row = jax.lax.complex(row, placed) if learned.shift else row + placed
    spectrum, taps = learned.transform("input", u), learned.transform("kernel", row)
    if kernel.ndim == 3:
        spectrum = jnp.expand_dims(spectrum, -learned.plan.order - 2)
    return learned.back(spectrum * taps)[..., : u.shape[-1]]


def _causal(learned: _Learned, u: Float[Array, "*B D L"], kernel: Float[Array, "*C D K"]) -> Float[Array, "..."]:
    """Blocks of steps: the fixed transform within each, the learned one from each to the later ones."""
    plan, length = learned.plan, u.shape[-1]
    rows = _cut(u, plan.n)
    taps = _cut(kernel, plan.n)[..., : rows.shape[-2], :]  # whole blocks: once learned, a block's last taps reach far
    if kernel.ndim == 3:
        rows = jnp.expand_dims(rows, -4)
    first = forward(taps[..., :1, :], plan, RIGHT_ANGLE, precision=learned.precision)
    spectra = forward(rows, plan, RIGHT_ANGLE, precision=learned.precision) * first
    across = _across(learned, rows, taps) if rows.shape[-2] > 1 else jnp.zeros_like(spectra)
    if not learned.butterfly.learn_inverse:
        y = inverse(spectra + across, plan, RIGHT_ANGLE, real=True, precision=learned.precision)
    else:
        y = inverse(spectra, plan, RIGHT_ANGLE, real=True, precision=learned.precision) + learned.back(across, inner=1)
    return y.reshape(*y.shape[:-2], y.shape[-2] * plan.n)[..., :length]


def _across(
    learned: _Learned, rows: Float[Array, "*rows J P"], taps: Float[Array, "*C D T P"]
) -> Complex[Array, "..."]:
    """The spectra of what each block gets from those before it."""
    axis, count = -learned.plan.order - 1, rows.shape[-2]
    x, k = learned.transform("input", rows, inner=1), learned.transform("kernel", taps, inner=1)
    k = _shift(k, 0, 1, axis) + 1j * _shift(k, 1, 0, axis)
    across = jnp.zeros((), x.dtype)
    for lag in range(1, min(count, k.shape[axis])):
        earlier = jax.lax.slice_in_dim(x, 0, count - lag, axis=axis)
        across = across + _shift(earlier * jax.lax.slice_in_dim(k, lag, lag + 1, axis=axis), lag, 0, axis)
    return across


def _cut(x: Float[Array, "*rows _"], points: int) -> Float[Array, "*rows blocks {points}"]:
    blocks = -(-x.shape[-1] // points)
    return _pad(x, blocks * points).reshape(*x.shape[:-1], blocks, points)


def _shift(x: Complex[Array, "..."], before: int, after: int, axis: int) -> Complex[Array, "..."]:
    """With so many zeros before and after along an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths)


def _pad(x: Inexact[Array, "*rows _"], points: int) -> Inexact[Array, "*rows {points}"]:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, points - x.shape[-1])])


def _sixteens(minimum: int) -> Plan:
    """Factors of 16 and one of what remains, as in the authors' code, of at least so many points."""
    factors, rest = [], minimum
    while rest > LARGEST_FACTOR:
        factors.append(LARGEST_FACTOR)
        rest = -(-rest // LARGEST_FACTOR)
    if len(factors) >= MAX_ORDER:
        raise ValueError(
            f"factors must be given for {minimum} points, more than {MAX_ORDER} of {LARGEST_FACTOR} have; got None."
        )
    return Plan((*factors, rest))


def _check_blocks(blocks: dict[str, Blocks], butterfly: LearnedButterfly, plan: Plan, features: int) -> None:
    copies = features if butterfly.per_feature else 1
    shapes = block_shapes(plan, copies=copies, per_stage=butterfly.per_stage)
    want = dict.fromkeys(butterfly.transforms, shapes)
    got = {name: {stage: jnp.shape(block) for stage, block in tree.items()} for name, tree in blocks.items()}
    if got != want:
        raise ValueError(f"blocks must have the shapes {want} for {butterfly} and {plan}; got {got}.")
