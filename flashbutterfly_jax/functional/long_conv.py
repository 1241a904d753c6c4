"""The long convolution: what it means, what it accepts, and which implementation runs it."""

import difflib
import functools
import importlib
from typing import Annotated, Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flashbutterfly_jax.functional.arguments import floating, shaped
from flashbutterfly_jax.typing import ArrayLike, Backend, Implementation, Implementations, Precision, checked_by_hand

_NAMES: tuple[Implementation, ...] = get_args(Implementation.__value__)

# Where each implementation lives, imported on first use. A name without an entry is known but not part of this version.
_BACKENDS: dict[Implementation, str] = {
    "xla": "flashbutterfly_jax.functional.xla:long_conv_xla",
    "butterfly": "flashbutterfly_jax.functional.butterfly:long_conv_butterfly",
    "mosaic_gpu": "flashbutterfly_jax.functional.mosaic_gpu:long_conv_mosaic_gpu",
    "triton": "flashbutterfly_jax.functional.triton:long_conv_triton",
}

# Those that only CUDA devices run. With another one after it in the order, lowering for the device chooses.
_CUDA_ONLY: frozenset[Implementation] = frozenset({"mosaic_gpu", "triton"})

# Lengths that None gives to the Triton kernels, by compute capability: where one H100 was faster with them than with
# FFTs, forward and backward together. It stands for the other cards, which were not measured: 10.0 has the same
# kernels, cut up otherwise; those of the others ran on the H100 too, above 2048 steps slower than FFTs.
_TRITON_LENGTHS: dict[str, range] = dict.fromkeys(("9.0", "10.0"), range(1024, 8193, 8)) | dict.fromkeys(
    ("8.0", "8.6", "8.9", "12.0"), range(1024, 2049, 1024)
)

# Lengths that None gives to the fused kernel on Hopper: its shortest transform has 1024 points, with which it is no
# faster than FFTs of 128 steps; three passes end at 4,194,304.
_FUSED_LENGTHS = range(256, 2**22 + 1)


@checked_by_hand
def long_conv(
    u: Annotated[ArrayLike, "*B D L"],
    kernel: Annotated[ArrayLike, "*C D K"],
    skip: Annotated[ArrayLike, "*C D"] | None = None,
    *,
    reverse_kernel: Annotated[ArrayLike, "*C D K"] | None = None,
    circular: bool = False,
    pre_gate: Annotated[ArrayLike, "*B D L"] | None = None,
    post_gate: Annotated[ArrayLike, "*BC D L"] | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*BC D L"]:
    r"""Convolves each feature of a sequence with its own kernel, as long as the sequence or of any other length.

    .. math:: y_t = \sum_{0 \le s \le t} k_{t-s}\, u_s + d\, u_t

    is the causal convolution of Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling"
    (ICML 2023, https://arxiv.org/abs/2302.06646). A reverse kernel r adds :math:`\sum_{s > t} r_{s-t-1} u_s`, so
    that lag -m uses tap m - 1. Gates multiply u before and y after:
    ``post_gate * long_conv(pre_gate * u, kernel, skip)``. Taps past the length reach nothing and change nothing.

    The result has the dtype of u. Arguments may have different dtypes, such as a bfloat16 u with a float32 kernel;
    each gradient has the dtype of its argument. ``"xla"`` computes in float32, and in float64 where any argument is.

    Args:
      u: the sequence, ``(*B, D, L)``, of a real floating-point dtype. Array-likes are accepted here and below.
      kernel: ``(D, K)``, or ``(C, D, K)`` for C kernels over the same u. Any K >= 1, shorter or longer than L.
      skip: the weight of u itself, ``(D,)``, or ``(C, D)`` where the kernel has channels.
      reverse_kernel: the kernel that looks ahead, of the kernel's shape. None is causal.
      circular: wraps every lag modulo L, those of the reverse kernel too. No tap is out of reach then.
      pre_gate: ``(*B, D, L)``.
      post_gate: ``(*B, D, L)``, shared by the channels, or ``(*B, C, D, L)``.
      precision: of the matrix products of an implementation that has some; FFTs ignore it.
      implementation: ``"xla"`` (real FFTs), ``"butterfly"``, ``"mosaic_gpu"`` or ``"triton"``, which run or raise; a
        sequence of names, of which the first that supports the request runs; or None, which always works.

    Returns:
      ``(*B, D, L)``, or ``(*B, C, D, L)`` where the kernel has channels.

    Raises:
      ValueError: if an argument has a wrong shape, dtype or value.
      NotImplementedError: if the request is valid, but no implementation named supports it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flashbutterfly_jax import long_conv
      >>> u = jnp.array([[1.0, 0.0, 0.0, 2.0]])
      >>> long_conv(u, jnp.array([[4.0, 3.0]])).round(4)
      Array([[4., 3., 0., 8.]], dtype=float32)
      >>> long_conv(u, jnp.array([[4.0, 3.0]]), circular=True).round(4)
      Array([[10.,  3.,  0.,  8.]], dtype=float32)
    """
    precision = _canonical_precision(precision)
    if not isinstance(circular, bool):
        raise ValueError(f"circular must be True or False; got {circular!r}.")
    u = _whole_sequences("u", u)
    if u.ndim < 2:
        raise ValueError(f"u must have shape (*B, D, L), at least two axes; got shape {u.shape}.")
    names = _default_order(u) if implementation is None else _resolve(implementation)
    *batch, features, length = u.shape
    kernel = _whole_sequences("kernel", kernel)
    if kernel.ndim not in (2, 3) or kernel.shape[-2] != features or kernel.shape[-1] < 1:
        raise ValueError(
            f"kernel must have shape (D, K) or (C, D, K) with K >= 1 and D = {features} as in u of shape {u.shape}; "
            f"got shape {kernel.shape}."
        )
    channels = kernel.shape[:-2]
    result_shape = (*batch, *channels, features, length)
    skip = shaped("skip", skip, kernel.shape[:-1], of="kernel without its taps")
    reverse_kernel = shaped("reverse_kernel", reverse_kernel, kernel.shape, of="kernel")
    pre_gate = shaped("pre_gate", pre_gate, u.shape, of="u")
    post_gate = shaped("post_gate", post_gate, u.shape, result_shape, of="u or of the result")

    if not channels:
        kernel = kernel[None]
        skip = None if skip is None else skip[None]
        reverse_kernel = None if reverse_kernel is None else reverse_kernel[None]
    if post_gate is not None and post_gate.ndim == u.ndim:
        post_gate = post_gate[..., None, :, :]
    y = _run(
        names,
        u,
        kernel,
        skip,
        reverse_kernel=reverse_kernel,
        circular=circular,
        pre_gate=pre_gate,
        post_gate=post_gate,
        precision=precision,
    )
    return y if channels else y[..., 0, :, :]


def _run(names: tuple[Implementation, ...], u: Array, kernel: Array, *args, **kwargs) -> Array:
    """The result of the first implementation that supports the request."""
    reasons = []
    for position, name in enumerate(names, 1):
        try:
            backend = _load(name)
            if not u.size or not kernel.size:
                return jnp.zeros((*u.shape[:-2], kernel.shape[0], *u.shape[-2:]), u.dtype)
            elsewhere = tuple(other for other in names[position:] if other not in _CUDA_ONLY)
            if name in _CUDA_ONLY and elsewhere:
                return _by_platform(backend, functools.partial(_run, elsewhere), u, kernel, *args, **kwargs)
            return backend(u, kernel, *args, **kwargs)
        except NotImplementedError as reason:
            if len(names) == 1:
                raise
            reasons.append(f"{name!r}: {reason}")
    raise NotImplementedError("No implementation named supports this request. " + " ".join(reasons))


def _by_platform(cuda, default, *args, circular, precision, **kwargs) -> Array:
    """One of two implementations, chosen when the computation is lowered for a device."""
    cuda, default = (functools.partial(run, circular=circular, precision=precision) for run in (cuda, default))
    return jax.lax.platform_dependent(
        args,
        kwargs,
        cuda=lambda args, kwargs: cuda(*args, **kwargs),
        default=lambda args, kwargs: default(*args, **kwargs),
    )


def _default_order(u: Array) -> tuple[Implementation, ...]:
    """What None tries. The last takes every valid request.

    Fused kernels come first where they are faster at the error that the dtype of u has anyway: those for Hopper, then
    those by Triton, which are slower there. Which card it is, the devices of this process say when it is traced, for no
    rule of lowering tells one CUDA device from another; a device that is not here, for which the computation may yet be
    lowered, is taken for Hopper.
    """
    names: list[Implementation] = []
    if jnp.finfo(u.dtype).bits == 16:
        if u.shape[-1] in _FUSED_LENGTHS and _may_be_hopper():
            names.append("mosaic_gpu")
        if u.shape[-1] in _TRITON_LENGTHS.get(_capability(), ()):
            names.append("triton")
    return *names, "xla"


def _may_be_hopper() -> bool:
    return jax.default_backend() != "gpu" or all(d.compute_capability == "9.0" for d in jax.devices())


def _capability() -> str:
    """That of this process' GPUs, empty for none or for several kinds."""
    found = {d.compute_capability for d in jax.devices()} if jax.default_backend() == "gpu" else set()
    return found.pop() if len(found) == 1 else ""


def _load(name: Implementation) -> Backend:
    if name not in _BACKENDS:
        raise NotImplementedError(f"implementation {name!r} is not part of this version; {tuple(_BACKENDS)} are.")
    module, function = _BACKENDS[name].split(":")
    return getattr(importlib.import_module(module), function)


def _resolve(implementation: Any) -> tuple[Implementation, ...]:
    names = tuple(implementation) if isinstance(implementation, list | tuple) else (implementation,)
    if not names:
        raise ValueError(f"implementation must name at least one of {_NAMES}, or be None; got {implementation!r}.")
    for name in names:
        if name not in _NAMES:
            nearest = difflib.get_close_matches(str(name), _NAMES, n=1, cutoff=0.0)[0]
            raise ValueError(f"implementation must be None or of {_NAMES}; got {name!r}. Did you mean {nearest!r}?")
    return names


def _canonical_precision(precision: Any) -> jax.lax.Precision | None:
    try:
        return None if precision is None else jax.lax.Precision(precision)
    except ValueError:
        names = tuple(p.name.lower() for p in jax.lax.Precision)
        raise ValueError(f"precision must be None, a jax.lax.Precision or of {names}; got {precision!r}.") from None


def _whole_sequences(name: str, value: Any) -> Array:
    array = floating(name, value)
    if array.ndim and (axis := jax.typeof(array).sharding.spec[-1]) is not None:
        raise ValueError(
            f"{name} must not be sharded along its last axis, since every output needs all of it; got {axis!r} of the "
            f"mesh there. Call jax.sharding.reshard first."
        )
    return array
