"""`learned_fft_conv`: padding, choice of configuration and derivatives around the learned kernels."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from pallas_kernels.fft_conv import learned_backward_sm90, learned_paired_sm90, learned_sm90, spectrum_sm90
from pallas_kernels.fft_conv.config import N1, TILE, Config
from pallas_kernels.fft_conv.learned_operation import Operation, on_gpu
from pallas_kernels.fft_conv.lowering import lowered_once, traced_once
from pallas_kernels.fft_conv.platform import varying_alike
from pallas_kernels.fft_conv.tables import _scale, block_scale, dft_tables
from pallas_kernels.fft_conv.tiles import Shapes


class Blocks(NamedTuple):
    """Complex blocks of one layer, the shift of the right angle and the 1/n of the way back included."""

    f1: Complex[Array, "64 64"]
    """`[k1, n1]`."""
    f2: Complex[Array, "n2 n2"]
    """`[n2, k2]`."""
    v2: Complex[Array, "n2 n2"]
    """`[k2, n2]`."""
    v1: Complex[Array, "64 64"]
    """`[n1, k1]`."""
    kernel_f1: Complex[Array, "64 64"]
    """Of the transform of the taps, `[k1, n1]`."""
    kernel_f2: Complex[Array, "n2 n2"]
    """`[n2, k2]`."""


def learned_fft_conv(
    u: Float[Array, "B D L"], taps: Float[Array, "D K"], blocks: Blocks, config: Config | None = None
) -> Float[Array, "B D L"]:
    """The learned right-angle convolution on Hopper GPUs, one launch forward, two backward or one at 4096 points.

    `Y = Re V1 (conj(T) * (C * K) V2)` with `C = (T * F1 X) F2` of each row and K likewise of its taps. Products are of
    16-bit numbers with float32 sums. It has derivatives by u, the taps and every block, once; they save the arguments
    and the taps' spectra, and compute everything else again. Under a sharded jit each device works on its own rows and
    features.

    Args:
      u: bfloat16 or float16; L at most 64 n2.
      taps: of lags from 0, K at most 64 n2.
      blocks: of all transforms; n2 is 16, 32 or 64.
      config: of the forward kernel, and of the backward ones its persistent blocks and at most two of its warpgroups;
        None chooses.

    Raises:
      NotImplementedError: for sizes or dtypes that no kernel has, and on being run without a CUDA device.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> u, taps = jnp.ones((2, 3, 1024), jnp.bfloat16), jnp.ones((3, 7))
      >>> blocks = Blocks(*(jnp.ones((n, n), jnp.complex64) for n in (64, 16, 16, 64, 64, 16)))
      >>> lowered = jax.jit(learned_fft_conv).trace(u, taps, blocks).lower(lowering_platforms=("cuda",))
      >>> "mosaic_gpu" in lowered.as_text()
      True
    """
    n2, length = blocks.f2.shape[0], u.shape[-1]
    config = learned_sm90.default_config(n2) if config is None else config
    if u.dtype not in (jnp.bfloat16, jnp.float16) or max(length, taps.shape[-1]) > config.points:
        raise NotImplementedError(
            f"the learned kernel takes bfloat16 or float16 sequences and taps of at most {config.points} steps; got "
            f"{u.dtype} of {length} with {taps.shape[-1]} taps."
        )
    if math.prod(u.shape) >= 2**31:
        raise NotImplementedError(
            f"the learned kernel addresses fewer than 2**31 numbers; got u of shape {u.shape}. Divide the batch."
        )
    first, second = _scale(N1), _scale(n2)
    transforms = _Transforms(
        _planes(blocks.f1 * first),
        _planes(blocks.f2 * second),
        _planes(blocks.v1.conj().T * (N1 * first)),
        _planes(blocks.v2.conj().T * (n2 * second)),
        _planes(blocks.kernel_f1 * first),
        _planes(blocks.kernel_f2 * second),
    )
    padded = jnp.pad(u, [(0, 0), (0, 0), (0, -length % (8 * n2))])
    operands = varying_alike(padded.reshape(*u.shape[:2], -1, n2), taps.astype(jnp.float32), *transforms)
    y = _conv(config, *operands[:2], _Transforms(*operands[2:]))
    return y.reshape(*u.shape[:2], -1)[..., :length]


class _Transforms(NamedTuple):
    """M and N of each transform (`learned_backward_sm90`), `(re | im, n, n)` in float32, scaled as in `tables`."""

    m: jax.Array
    n: jax.Array
    m_back: jax.Array
    """V1^H."""
    n_back: jax.Array
    """V2^H."""
    m_kernel: jax.Array
    n_kernel: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(config: Config, u, taps, transforms: _Transforms):
    """In the kernels' shapes: u and the result `(B, D, rows, n2)`."""
    return _conv_fwd(config, u, taps, transforms)[0]


def _conv_fwd(config, u, taps, transforms):
    y, spectrum = _on_gpu(_forward_op, config, u, taps, *transforms)
    return y, (u, taps, spectrum, transforms)  # a spectrum is as large as two rows of the batch


def _conv_bwd(config, saved, g):
    u, taps, spectrum, transforms = saved
    d_u, d_taps, *d_transforms = _on_gpu(_backward_op, config, u, g, taps, spectrum, *transforms)
    return d_u, d_taps, _Transforms(*d_transforms)


_conv.defvjp(_conv_fwd, _conv_bwd)


def _run_forward(u, taps, m, n, m_back, n_back, m_kernel, n_kernel, twiddle, shift, config: Config):
    """The convolution and the taps' spectra."""
    batch, features, length, _ = u.shape
    spectrum = _spectra(taps, m_kernel, n_kernel, twiddle, shift, config, u.dtype)
    tables = m, _real_form(n), m_back.mT, _real_form(n_back.mT), twiddle
    kernel = lowered_once(learned_sm90.forward, config, Shapes(batch, 1, features, length, u.dtype))
    return kernel(u, spectrum, *(table.astype(u.dtype) for table in tables), shift)[:, 0], spectrum


def _run_backward(u, g, taps, spectrum, m, n, m_back, n_back, m_kernel, n_kernel, twiddle, shift, config: Config):
    batch, features, length, n2 = u.shape
    shapes = Shapes(batch, 1, features, length, u.dtype)
    if n2 == TILE:
        tables = jnp.stack([m, m_back]), jnp.stack([n, n_back]), twiddle
        kernel = lowered_once(learned_paired_sm90.backward, shapes, config.blocks)
        d_u, *parts = kernel(u, g, spectrum, shift, *(table.astype(u.dtype) for table in tables))
        d_m, d_n, d_spectrum = (part.sum(0) for part in parts)
        cotangents = [d_m[0], d_n[0], d_m[1], d_n[1]]
    else:
        of_u, of_g = (u, m, n), (g, m_back, n_back)
        d_u, d_spectrum, cotangents = _by_launches(shapes, of_u, of_g, spectrum, twiddle, shift, config)
    d_taps, *of_taps = cotangents_of_taps(taps, m_kernel, n_kernel, twiddle, d_spectrum, config)
    return d_u, d_taps, *cotangents, *of_taps


def _by_launches(shapes, of_u, of_g, spectrum, twiddle, shift, config: Config):
    """Cotangents of u, of the taps' spectra and of the blocks of u and g, by a launch for each."""
    n2, dtype = config.n2, shapes.dtype
    d_last, cotangents = [], []
    for derives_u, own, other in ((True, of_u, of_g), (False, of_g, of_u)):
        tables = {
            "other_first": other[1],
            "other_second": _real_form(other[2]),
            "own_first": own[1],
            "own_second": _real_form(own[2]),
            "own_back": _real_form(_adjoint(own[2])),
            "twiddle": twiddle,
        }
        kernel = lowered_once(learned_backward_sm90.backward, backward_config(config), shapes, derives_u)
        in_dtype = (tables[name].astype(dtype) for name in learned_backward_sm90.tables(derives_u))
        d_m, d_n, last = kernel(other[0], own[0], spectrum, shift, *in_dtype)
        cotangents += [d_m.sum(0), learned_backward_sm90.second_cotangent(d_n, n2)]
        d_last.append(last)
    d_u, d_spectra = d_last
    return d_u, d_spectra.sum(0), cotangents


def backward_config(config: Config) -> Config:
    """That of the backward launches beside this forward one.

    Example:
      >>> config = Config(16, warpgroups=4, blocks=8)
      >>> backward_config(config)
      Config(n2=16, warpgroups=2, spectrum_slots=2, blocks=8)
    """
    default = learned_backward_sm90.default_config(config.n2)
    return dataclasses.replace(default, warpgroups=min(default.warpgroups, config.warpgroups), blocks=config.blocks)


def _spectra(taps, m, n, twiddle, shift, config: Config, dtype):
    """`(D, 2, 64, n2)` in a 16-bit dtype."""
    kernel = traced_once(spectrum_sm90.tap_transform, config.n2, config.blocks, dtype, False)
    return kernel(taps[:, None], m, _real_form(n), twiddle, shift)[:, 0]


def cotangents_of_taps(taps, m, n, twiddle, d_spectrum, config: Config):
    """Of the taps, of M and of N, for that of the spectra, `(D, 2, 64, n2)`.

    By real products of float32 numbers, which a GPU rounds to 11 bits unless `jax_default_matmul_precision` says
    otherwise; the spectra come from 16-bit numbers. Complex ones would be twice the operations, of float32 numbers
    without tensor cores. In the names of the axes, p and q are real and imaginary part, t is n1, k is k1, m is n2 and c
    is k2.
    """
    scale = 1 / (config.points * block_scale(config) ** 3)
    count, points = taps.shape[-1], config.points
    rows = jnp.pad(taps * scale, [(0, 0), (0, points - count)]).reshape(-1, N1, config.n2)
    re, im = twiddle
    a = jnp.einsum("pkt,dtm->pdkm", m, rows)
    b = jnp.stack([a[0] * re - a[1] * im, a[0] * im + a[1] * re])
    products = jnp.einsum("pdkm,dqkc->pqmc", b, d_spectrum)
    d_n = jnp.stack([products[0, 0] + products[1, 1], products[0, 1] - products[1, 0]])
    back = _real_form(_adjoint(n)).reshape(2, config.n2, 2, config.n2)
    d_b = jnp.einsum("dpkc,pcqm->qdkm", d_spectrum, back)
    d_a = jnp.stack([d_b[0] * re + d_b[1] * im, d_b[1] * re - d_b[0] * im])
    d_m = jnp.einsum("pdkm,dtm->pkt", d_a, rows)
    d_rows = jnp.einsum("pkt,pdkm->dtm", m, d_a)
    return scale * d_rows.reshape(-1, points)[:, :count], d_m, d_n


def _planes(z):
    return jnp.stack([z.real, z.imag]).astype(jnp.float32)


def _adjoint(planes):
    return jnp.stack([planes[0].T, -planes[1].T])


def _real_form(planes):
    """As a right factor of real and imaginary part side by side, `(2, n2, re | im k2)`."""
    re, im = planes
    return jnp.stack([jnp.concatenate([re, im], 1), jnp.concatenate([-im, re], 1)])


_OF_BLOCKS = "r s t", "v w x", "a c e", "f g h", "i j m", "o p q"
_TWIDDLE = "y z zz"
_SPECTRUM = "d sp sk sc"
_forward_op = Operation(_run_forward, ["b d l n", "d k", *_OF_BLOCKS, _TWIDDLE], ["b d l n", _SPECTRUM])
_backward_op = Operation(
    _run_backward,
    ["b d l n", "b d l n", "d k", _SPECTRUM, *_OF_BLOCKS, _TWIDDLE],
    ["b d l n", "d k", *_OF_BLOCKS],
    sums=True,
)


def _on_gpu(operation, config: Config, *operands):
    return on_gpu(operation, config, *operands, dft_tables(config, jnp.float32)[2])
