"""Parameters of other people's code, turned into ours."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

_WEIGHT, _BIAS = "output_linear.0.weight", "output_linear.0.bias"
_MODEL, _STANDALONE = "kernel.kernel", "kernel"  # the kernel's name in the two versions of the layer


def from_safari(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of our `LongConv` from a PyTorch ``LongConv`` of the authors' code (HazyResearch/safari).

    Takes the state dict of one layer, of either version there. That of the models has ``D (C, H)``,
    ``kernel.kernel (C, H, L)`` or ``(2C, H, L)`` where bidirectional, ``output_linear.0.weight (2H, CH)`` and
    ``output_linear.0.bias (2H,)``. That of the standalone file calls its kernel ``kernel (C, H, 2L)`` and convolves
    circularly over 2L positions: whatever its comments say, its last L taps look ahead, so it becomes a bidirectional
    layer with ``kernel_length=L``.

    Their kernels are longer than the batch's sequences at times, and then leak future tokens into the past; ours never
    do. Where the lengths agree the layers do too.

    Args:
      state_dict: name to PyTorch tensor or array; of a whole model, only the layer's entries without their prefix.

    Returns:
      Our parameters, float32: for ``linen.LongConv(features=H, kernel_length=L, channels=C, bidirectional=...)`` as
      ``{"params": ...}``, for ``nnx.LongConv`` by ``nnx.update``.

    Raises:
      ValueError: if a name is missing or unknown, or a shape disagrees with the others.

    Example:
      >>> import numpy as np
      >>> import flashbutterfly_jax as fb
      >>> theirs = {
      ...     "D": np.ones((2, 8)),
      ...     "kernel.kernel": np.ones((2, 8, 64)),
      ...     "output_linear.0.weight": np.ones((16, 16)),
      ...     "output_linear.0.bias": np.ones(16),
      ... }
      >>> params = from_safari(theirs)
      >>> layer = fb.linen.LongConv(features=8, kernel_length=64, channels=2)
      >>> layer.apply({"params": params}, np.ones((64, 8), np.float32)).shape
      (64, 8)
    """
    arrays = {name: _to_array(value) for name, value in state_dict.items()}
    kernel_name = _STANDALONE if _STANDALONE in arrays else _MODEL
    expected = {"D", kernel_name, _WEIGHT, _BIAS}
    if arrays.keys() != expected:
        raise ValueError(
            f"state_dict must have the names {sorted(expected)}; missing: {sorted(expected - arrays.keys())}, "
            f"unknown: {sorted(arrays.keys() - expected)}."
        )
    skip, kernel, weight, bias = (arrays[name] for name in ("D", kernel_name, _WEIGHT, _BIAS))
    if skip.ndim != 2:
        raise ValueError(f"state_dict['D'] must have shape (C, H); got shape {skip.shape}.")
    channels, features = skip.shape
    _check_shape(_WEIGHT, weight, (2 * features, channels * features), skip.shape)
    _check_shape(_BIAS, bias, (2 * features,), skip.shape)
    rows = (channels,) if kernel_name == _STANDALONE else (channels, 2 * channels)
    even = kernel_name == _MODEL or kernel.shape[-1] % 2 == 0
    if kernel.ndim != 3 or kernel.shape[0] not in rows or kernel.shape[1] != features or not even:
        wanted = f"({channels}, H, 2L)" if kernel_name == _STANDALONE else f"({channels} or {2 * channels}, H, L)"
        raise ValueError(
            f"state_dict[{kernel_name!r}] must have shape {wanted} with H = {features}, as state_dict['D'] has shape "
            f"{skip.shape}; got shape {kernel.shape}."
        )
    if kernel_name == _STANDALONE:
        forward, reverse = np.split(kernel, 2, axis=-1)
        kernel = np.concatenate([forward, reverse[..., ::-1]])  # index 2L - m holds lag -m
    return {
        "kernel": jnp.asarray(kernel),
        "skip": jnp.asarray(skip),
        "output": {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)},
    }


def _to_array(value: Any) -> Float[np.ndarray, "..."]:
    """A float32 array of a PyTorch tensor, on any device and of any dtype, or of an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.asarray(value, np.float32)


def _check_shape(name: str, value: np.ndarray, shape: tuple[int, ...], skip_shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(
            f"state_dict[{name!r}] must have shape {shape}, as state_dict['D'] has shape (C, H) = {skip_shape}; "
            f"got shape {value.shape}."
        )
