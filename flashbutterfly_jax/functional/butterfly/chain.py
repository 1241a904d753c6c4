r"""The learned right-angle convolution in two factors, and its cotangents, product by product.

What a fused kernel computes, with the blocks as inputs: its values and its gradients are checked against these. One row
of u is a matrix X[n1, n2], t = N2 n1 + n2; its spectrum has frequency k1 + N1 k2 at [k1, k2]. With blocks F1 and F2 on
the way there, V2 and V1 on the way back, the fixed twiddle T and the spectrum K of the taps,

    A = F1 X      B = T * A      C = B F2      P = C * K      Q = P V2      W = conj(T) * Q      Y = Re(V1 W)

and, with G the cotangent of Y and z' short for dL/d(Re z) + i dL/d(Im z), H for the conjugate transpose,

    W' = V1^H G               V1' = sum G W^H
    Q' = T * W'               V2' = sum P^H Q'
    P' = Q' V2^H              K'  = sum conj(C) * P'
    C' = sum_c conj(K) * P'   F2' = sum B^H C'
    B' = C' F2^H
    A' = conj(T) * B'         F1' = sum A' X^T          X' = Re(F1^H A')

where the sums of blocks go over batch, channels and features, and that of K over the batch. The spectrum K comes from
the same first three products with blocks of its own, and so do their cotangents, with K' in place of C'.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from flashbutterfly_jax.functional.butterfly.convolution import RIGHT_ANGLE
from flashbutterfly_jax.functional.butterfly.transform import twiddle

type _Block = Complex[Array, "_ _"]


class Chain(NamedTuple):
    """The blocks that all features share, the shift of the right angle and the 1/n of the inverse included."""

    f1: _Block
    """``[k1, n1]``."""
    f2: _Block
    """``[n2, k2]``."""
    v2: _Block
    """``[k2, n2]``."""
    v1: _Block
    """``[n1, k1]``."""


class Cotangents(NamedTuple):
    """Of a chain's inputs; of the complex ones dL/d(Re z) + i dL/d(Im z), the conjugate of what JAX gives."""

    x: Float[Array, "B D n1 n2"]
    spectrum: Complex[Array, "C D n1 n2"]
    chain: Chain


def learned_reference_spectrum(
    taps: Float[Array, "*rows n1 n2"], f1: _Block, f2: _Block
) -> Complex[Array, "*rows n1 n2"]:
    """The transform of rows, C of the chain: of u, or with the other blocks K of the taps."""
    return (_twiddle(f1, f2) * (f1 @ taps)) @ f2


def learned_reference_forward(
    x: Float[Array, "B D n1 n2"], spectrum: Complex[Array, "C D n1 n2"], chain: Chain
) -> Float[Array, "B C D n1 n2"]:
    """Y of every row and channel.

    Example:
      >>> from flashbutterfly_jax.functional.butterfly import Plan, dft_blocks, inverse_dft_blocks
      >>> (f1, f2), (v1, v2) = (map(jnp.asarray, of(Plan((2, 2)), 0.25)) for of in (dft_blocks, inverse_dft_blocks))
      >>> k = learned_reference_spectrum(jnp.array([[[[4.0, 3.0], [0.0, 0.0]]]]), f1, f2)
      >>> x = jnp.array([[[[1.0, 1.0], [0.0, 2.0]]]])  # 1, 1, 0, 2
      >>> learned_reference_forward(x, k, Chain(f1, f2, v2, v1)).ravel().round(4)
      Array([4., 7., 3., 8.], dtype=float32)
    """
    c = learned_reference_spectrum(x, chain.f1, chain.f2)
    q = (c[:, None] * spectrum) @ chain.v2
    return (chain.v1 @ (_twiddle(chain.f1, chain.f2).conj() * q)).real


def learned_reference_backward(
    x: Float[Array, "B D n1 n2"],
    spectrum: Complex[Array, "C D n1 n2"],
    chain: Chain,
    g: Float[Array, "B C D n1 n2"],
) -> Cotangents:
    """The cotangents for that of Y, g; what the forward pass made is made again."""
    t = _twiddle(chain.f1, chain.f2)
    b = t * (chain.f1 @ x)
    c = b @ chain.f2
    p = c[:, None] * spectrum
    w = t.conj() * (p @ chain.v2)

    d_w = _adjoint(chain.v1) @ g
    d_q = t * d_w
    d_p = d_q @ _adjoint(chain.v2)
    d_spectrum = (c.conj()[:, None] * d_p).sum(0)
    d_c = (spectrum.conj() * d_p).sum(1)
    d_x, d_f1, d_f2 = learned_reference_spectrum_backward(x, chain.f1, chain.f2, d_c)
    d_v2, d_v1 = _total(_adjoint(p) @ d_q), _total(g @ _adjoint(w))
    return Cotangents(d_x, d_spectrum, Chain(d_f1, d_f2, d_v2, d_v1))


def learned_reference_spectrum_backward(
    x: Float[Array, "*rows n1 n2"], f1: _Block, f2: _Block, d_c: Complex[Array, "*rows n1 n2"]
) -> tuple[Float[Array, "*rows n1 n2"], _Block, _Block]:
    """The cotangents of rows, F1 and F2 for that of their spectra."""
    t = _twiddle(f1, f2)
    d_a = t.conj() * (d_c @ _adjoint(f2))
    d_f2 = _total(_adjoint(t * (f1 @ x)) @ d_c)
    return (_adjoint(f1) @ d_a).real, _total(d_a @ x.mT), d_f2


def _twiddle(f1: _Block, f2: _Block) -> Complex[Array, "n1 n2"]:
    return jnp.asarray(twiddle(f1.shape[-1], f2.shape[-1], RIGHT_ANGLE), f1.dtype)


def _adjoint(z: Complex[Array, "*rows i j"]) -> Complex[Array, "*rows j i"]:
    return z.mT.conj()


def _total(products: Complex[Array, "*rows i j"]) -> Complex[Array, "i j"]:
    return products.sum(tuple(range(products.ndim - 2)))
