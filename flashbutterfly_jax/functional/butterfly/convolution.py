"""Long convolution by butterfly transforms, without padding to twice the length and without reordering a spectrum.

Right angle. With psi = exp(-pi i / 2n), the transform shifted by a quarter of a frequency is that of x[t] psi^t. What a
cyclic product of n >= L points wraps around then comes back times psi^(+-n) = -+i, at a right angle to what belongs
there: the real part of the result is the causal convolution alone. A tap that looks ahead m steps belongs at lag -m,
which is index n - m times psi^-n = +i, so it enters as an imaginary tap and its gradient is an imaginary part.

Cyclic. Without the shift the product wraps as it is. Frequencies come in conjugate pairs, of which half are carried.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact

from flashbutterfly_jax.functional.butterfly.plans import Plan, fast_plan, plan
from flashbutterfly_jax.functional.butterfly.transform import forward, inverse
from flashbutterfly_jax.functional.taps import circular_taps
from flashbutterfly_jax.typing import Precision

RIGHT_ANGLE = 0.25
"""The shift, in frequencies, at which what wraps around is a quarter turn away."""

type _Taps = Float[Array, "C D _"]


@functools.partial(jax.jit, static_argnames=("circular", "precision"))
def long_conv_butterfly(
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
    """The `Backend` behind ``implementation="butterfly"``: dense products on any platform, every mode and length.

    Computes in float32, or in float64 where any argument is float64. The channels share one transform of u; the
    gradient of the kernel sums over the batch before its one transform back. Rows never mix: a NaN stays in its row.
    ``precision`` is that of the products; None is the highest.
    """
    length, output_dtype = u.shape[-1], u.dtype
    arguments = (u, kernel, skip, reverse_kernel, pre_gate, post_gate)
    dtype = jnp.float64 if any(x is not None and x.dtype == jnp.float64 for x in arguments) else jnp.float32
    u, kernel = u.astype(dtype), kernel.astype(dtype)
    skip, reverse_kernel, pre_gate, post_gate = (x if x is None else x.astype(dtype) for x in arguments[2:])

    gated = u if pre_gate is None else u * pre_gate
    if skip is not None:
        kernel = kernel + _pad(skip[..., None], after=kernel.shape[-1] - 1)
    if circular:
        factors, cyclic = _circular_plan(length)
        kernel, reverse_kernel = _wrapped_taps(kernel, reverse_kernel, length, cyclic)
    else:
        factors, cyclic = fast_plan(length), False
        kernel, reverse_kernel = _reachable_taps(kernel, reverse_kernel, length)
    spectrum = kernel_spectrum(kernel, factors, reverse_kernel=reverse_kernel, circular=cyclic, precision=precision)
    y = conv_forward(gated, spectrum, factors, circular=cyclic, precision=precision)
    return (y if post_gate is None else y * post_gate).astype(output_dtype)


def kernel_spectrum(
    kernel: Float[Array, "C D K"],
    plan: Plan,
    *,
    reverse_kernel: Float[Array, "C D M"] | None = None,
    circular: bool = False,
    precision: Precision = None,
) -> Complex[Array, "C D *factors"]:
    """The spectrum that `conv_forward` multiplies by, in the order that `forward` leaves rows in.

    Args:
      kernel: taps of lags 0..K-1, K <= plan.n.
      plan: the factors.
      reverse_kernel: tap m - 1 is that of lag -m; at most plan.n - 1 of them.
      circular: False is the right-angle form, any length up to plan.n. True is the cyclic form, length plan.n alone,
        and keeps k_1 = 0..f_1//2.
      precision: as for `forward`.

    Raises:
      ValueError: there are more taps than lags.
    """
    if kernel.shape[-1] > plan.n:
        raise ValueError(f"kernel must have at most {plan.n} taps for {plan}, got {kernel.shape[-1]}")
    row = _pad(kernel, after=plan.n - kernel.shape[-1])
    if reverse_kernel is not None:
        if reverse_kernel.shape[-1] >= plan.n:
            raise ValueError(f"reverse_kernel must have at most {plan.n - 1} taps, got {reverse_kernel.shape[-1]}")
        ahead = _pad(jnp.flip(reverse_kernel, -1), before=plan.n - reverse_kernel.shape[-1])
        row = row + ahead if circular else jax.lax.complex(row, ahead)
    return _transform(row, plan, circular, precision)


def conv_forward(
    u: Float[Array, "*B D L"],
    spectrum: Complex[Array, "C D *factors"],
    plan: Plan,
    *,
    circular: bool = False,
    precision: Precision = None,
) -> Float[Array, "*B C D L"]:
    """Every row of u convolved with the kernels of a spectrum.

    Args:
      u: L <= plan.n, and L == plan.n if circular.
      spectrum: of the kernels, from `kernel_spectrum` with the same plan and mode.
      plan: the factors.
      circular: as for `kernel_spectrum`.
      precision: as for `forward`.

    Raises:
      ValueError: L does not fit the plan.

    Example:
      >>> plan = Plan((2, 2))
      >>> spectrum = kernel_spectrum(jnp.array([[[4.0, 3.0]]]), plan)
      >>> conv_forward(jnp.array([[1.0, 0.0, 2.0]]), spectrum, plan).round()
      Array([[[4., 3., 8.]]], dtype=float32)
    """
    rows = _row_spectrum(u, plan, circular, precision)
    product = jnp.expand_dims(rows, -plan.order - 2) * spectrum
    return _real_rows(product, plan, circular, precision)[..., : u.shape[-1]]


def input_gradient(
    g: Float[Array, "*B C D L"],
    spectrum: Complex[Array, "C D *factors"],
    plan: Plan,
    *,
    circular: bool = False,
    precision: Precision = None,
) -> Float[Array, "*B D L"]:
    """The gradient of `conv_forward` by u: the real part of the inverse of sum_C conj(spectrum) G.

    ``g`` is the gradient of its result, of L samples; the other arguments are those of `conv_forward`. The channels
    are summed as spectra, so that they share one inverse transform.

    Raises:
      ValueError: L does not fit the plan.
    """
    product = (_row_spectrum(g, plan, circular, precision) * spectrum.conj()).sum(-plan.order - 2)
    return _real_rows(product, plan, circular, precision)[..., : g.shape[-1]]


def kernel_gradient(
    u: Float[Array, "*B D L"],
    g: Float[Array, "*B C D L"],
    plan: Plan,
    taps: int,
    *,
    circular: bool = False,
    precision: Precision = None,
) -> tuple[Float[Array, "C D {taps}"], Float[Array, "C D {taps}"]]:
    """The gradients of `conv_forward` by the kernel and by the reverse kernel, ``taps`` of each.

    With z the inverse of sum_B conj(U) G, they are Re z[m] at lag m and Im z[n - m] at lag -m (Re, if circular). The
    batch is summed as spectra, so that there is one inverse transform. Lag -n does not exist: of the second result
    at most plan.n - 1 taps mean anything.

    Raises:
      ValueError: L does not fit the plan.
    """
    rows = jnp.expand_dims(_row_spectrum(u, plan, circular, precision), -plan.order - 2)
    product = rows.conj() * _row_spectrum(g, plan, circular, precision)
    product = product.sum(tuple(range(product.ndim - plan.order - 2)))
    if circular:
        lags = ahead = _real_rows(product, plan, circular, precision)
    else:
        both = inverse(product, plan, RIGHT_ANGLE, precision=precision)
        lags, ahead = both.real, both.imag
    return lags[..., :taps], jnp.flip(ahead, -1)[..., :taps]


def _row_spectrum(
    rows: Float[Array, "*rows L"], plan: Plan, circular: bool, precision: Precision
) -> Complex[Array, "..."]:
    length = rows.shape[-1]
    if length > plan.n or (circular and length != plan.n):
        wanted = "exactly" if circular else "at most"
        raise ValueError(f"rows must have {wanted} {plan.n} samples for {plan}, got {length}")
    return _transform(_pad(rows, after=plan.n - length), plan, circular, precision)


def _transform(
    rows: Inexact[Array, "*rows n"], plan: Plan, circular: bool, precision: Precision
) -> Complex[Array, "..."]:
    return forward(rows, plan, 0.0 if circular else RIGHT_ANGLE, half=circular, precision=precision)


def _real_rows(
    spectrum: Complex[Array, "..."], plan: Plan, circular: bool, precision: Precision
) -> Float[Array, "*rows n"]:
    return inverse(spectrum, plan, 0.0 if circular else RIGHT_ANGLE, half=circular, real=True, precision=precision)


def _circular_plan(length: int) -> tuple[Plan, bool]:
    """A plan for a circular convolution, and whether it is cyclic at exactly this length.

    The cyclic form carries half the frequencies, so a clumsy exact plan is worth up to twice a fast one.
    """
    exact, fast = plan(length), fast_plan(length)
    return (exact, True) if exact.cost <= 2 * fast.cost else (fast, False)


def _reachable_taps(kernel: _Taps, reverse_kernel: _Taps | None, length: int) -> tuple[_Taps, _Taps | None]:
    """The taps that reach a sample of the same sequence."""
    reverse_kernel = None if reverse_kernel is None or length == 1 else reverse_kernel[..., : length - 1]
    return kernel[..., :length], reverse_kernel


def _wrapped_taps(kernel: _Taps, reverse_kernel: _Taps | None, length: int, cyclic: bool) -> tuple[_Taps, _Taps | None]:
    """One tap for each lag around a circle of L samples; where the plan is not cyclic, seen from both sides.

    Sample t - m is sample t + (L - m): the tap of lag m, if m > 0, is also that of lag -(L - m).
    """
    taps = circular_taps(kernel, reverse_kernel, length)
    return taps, None if cyclic else jnp.flip(taps[..., 1:], -1)


def _pad(x: Float[Array, "*rows _"], *, before: int = 0, after: int = 0) -> Float[Array, "*rows _"]:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])
