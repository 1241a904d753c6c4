"""Parameters of other people's code, turned into ours."""

import re
from collections.abc import Mapping
from typing import Any

import jax
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


def from_h3(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of our `LanguageModel` from a PyTorch model of the authors' H3 code (HazyResearch/H3, safari).

    Takes the state dict of a whole model: ``backbone.embeddings.word_embeddings.weight``, for each layer
    ``backbone.layers.<i>.`` with ``norm1``, ``norm2``, ``mlp.fc1``, ``mlp.fc2`` and ``mixer``, and ``backbone.ln_f``.
    What the mixer is, its names say: ``Wqkv`` and ``out_proj`` are `CausalAttention`, ``ssm_k_kernel.kernel.C`` is
    `H3`, and ``k_kernel.kernel`` is `H3LongConv`, whose kernels there are ``(1, H, L)``. In the released checkpoints
    norms come after what they normalise (``backbone.ln_0``) and some names are older; they are read too.

    Heads of one feature alone (their default ``head_dim=1``) have the layout of ours. A model with rotary positions
    has no parameter that says so; theirs may turn only some features of each head, ours turns all.

    Args:
      state_dict: name to PyTorch tensor or array.

    Returns:
      Our parameters, float32, for ``linen.LanguageModel(vocab_size, features, num_layers, mixer, attention_layers)``.

    Raises:
      ValueError: if a name is missing or unknown, or a shape disagrees with the others.
    """
    arrays = _H3Arrays(_current_h3_names({name: _to_array(value) for name, value in state_dict.items()}))
    embedding = arrays.take("backbone.embeddings.word_embeddings.weight", None, None)
    features = embedding.shape[1]
    layers = {match[1] for name in arrays.left if (match := re.match(r"backbone\.layers\.(\d+)\.", name))}
    params = {"embedding": embedding, "final_norm": arrays.norm("backbone.ln_f", features)}
    for layer in map(str, range(len(layers))):
        prefix = f"backbone.layers.{layer}"
        hidden = arrays.dense(f"{prefix}.mlp.fc1", features, None)
        params[f"layers_{layer}"] = {
            "mixer_norm": arrays.norm(f"{prefix}.norm1", features),
            "mixer": _h3_mixer(arrays, f"{prefix}.mixer", features),
            "mlp_norm": arrays.norm(f"{prefix}.norm2", features),
            "mlp": {
                "hidden": hidden,
                "output": arrays.dense(f"{prefix}.mlp.fc2", hidden["bias"].shape[0], features),
            },
        }
    head = arrays.left.pop("lm_head.weight", embedding)
    if not np.array_equal(head, embedding):
        raise ValueError("state_dict['lm_head.weight'] must be the embedding, to which it is tied; got another matrix.")
    if arrays.left:
        raise ValueError(f"state_dict must have the names of an H3 model; got besides {sorted(arrays.left)}.")
    return jax.tree.map(jnp.asarray, params)


def _h3_mixer(arrays: "_H3Arrays", prefix: str, features: int) -> dict[str, Any]:
    if f"{prefix}.Wqkv.weight" in arrays.left:
        joint = arrays.dense(f"{prefix}.Wqkv", features, 3 * features)
        arrays.left.pop(f"{prefix}.rotary_emb.inv_freq", None)
        parts = zip(np.split(joint["kernel"], 3, axis=1), np.split(joint["bias"], 3), strict=True)
        attention = {
            name: {"kernel": kernel, "bias": bias}
            for name, (kernel, bias) in zip(("query", "key", "value"), parts, strict=True)
        }
        return {**attention, "output": arrays.dense(f"{prefix}.out_proj", features, features)}
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "output_linear"}
    dense = {ours: arrays.dense(f"{prefix}.{theirs}", features, features) for ours, theirs in names.items()}
    if f"{prefix}.k_kernel.kernel" in arrays.left:
        key = arrays.take(f"{prefix}.k_kernel.kernel", 1, features, None)[0]
        memory = arrays.take(f"{prefix}.kernel.kernel", 1, features, key.shape[1])[0]
        return {
            **dense,
            "key_filter": {"kernel": key, "skip": arrays.take(f"{prefix}.k_D", features)},
            "memory_filter": {"kernel": memory, "skip": arrays.take(f"{prefix}.D", features)},
        }
    shift, diagonal = f"{prefix}.ssm_k_kernel.kernel", f"{prefix}.kernel.kernel"
    state = arrays.take(f"{shift}.B", features, None)
    output = arrays.take(f"{diagonal}.C", 1, features, None, 2)[0]
    pairs = output.shape[1]
    return {
        **dense,
        "key_filter": {
            "input": state,
            "output": arrays.take(f"{shift}.C", 1, *state.shape)[0],
            "skip": arrays.take(f"{prefix}.ssm_k_D", features),
        },
        "memory_filter": {
            "log_decay": arrays.take(f"{diagonal}.inv_A_real", features, pairs),
            "frequency": arrays.take(f"{diagonal}.A_imag", features, pairs),
            "log_step": arrays.take(f"{diagonal}.log_dt", features),
            "input": arrays.take(f"{diagonal}.B", features, pairs, 2),
            "output": output,
            "skip": arrays.take(f"{prefix}.D", features),
        },
    }


class _H3Arrays:
    """The arrays of a state dict that nobody has taken yet."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.left = dict(arrays)

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """The array of that name and shape, where None is any size."""
        if name not in self.left:
            raise ValueError(f"state_dict must have {name!r}; it has no such name.")
        array = self.left.pop(name)
        if len(array.shape) != len(shape) or any(
            wanted not in (None, got) for wanted, got in zip(shape, array.shape, strict=True)
        ):
            expected = f"({', '.join('any' if size is None else str(size) for size in shape)})"
            raise ValueError(f"state_dict[{name!r}] must have shape {expected}; got shape {array.shape}.")
        return array

    def dense(self, prefix: str, inputs: int, outputs: int | None) -> dict[str, np.ndarray]:
        weight = self.take(f"{prefix}.weight", outputs, inputs)
        return {"kernel": weight.T, "bias": self.take(f"{prefix}.bias", weight.shape[0])}

    def norm(self, prefix: str, features: int) -> dict[str, np.ndarray]:
        return {"scale": self.take(f"{prefix}.weight", features), "bias": self.take(f"{prefix}.bias", features)}


def _current_h3_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of a released checkpoint as those of the current code, whose norms stand before what they normalise."""
    renamed = {}
    for name, array in arrays.items():
        name = re.sub(r"^model\.", "", name)
        name = re.sub(r"^s4seq\.encoder\.", "backbone.", name)
        name = re.sub(r"^embedding\.", "backbone.embeddings.word_embeddings.", name)
        renamed[re.sub(r"^backbone\.norm\.", "backbone.ln_f.", name)] = array
    if "backbone.ln_0.weight" not in renamed:
        return renamed
    layers = 1 + max(int(match[1]) for name in renamed if (match := re.match(r"backbone\.layers\.(\d+)\.", name)))
    # The norms in the order in which they are applied: before each mixer, before each MLP, and in the end.
    places = [f"backbone.layers.{layer}.norm{number}" for layer in range(layers) for number in (1, 2)]
    moved = dict(zip(["backbone.ln_0", *places], [*places, "backbone.ln_f"], strict=True))
    return {f"{moved.get(prefix, prefix)}.{last}": array for (prefix, last), array in _split_names(renamed)}


def _split_names(arrays: dict[str, np.ndarray]) -> list[tuple[tuple[str, str], np.ndarray]]:
    parts = ((name.rpartition("."), array) for name, array in arrays.items())
    return [((prefix, last), array) for (prefix, _, last), array in parts]


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
