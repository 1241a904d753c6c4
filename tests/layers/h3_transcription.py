"""The authors' H3 language models in float64 numpy, on a state dict in their layout, written down from their equations.

Convolutions are sums, state-space models are recurrences, and layers follow one another as they do there.
"""

import numpy as np

D, LAYERS, VOCAB, TAPS, STATE, HEADS = 8, 3, 11, 24, 6, 2


def state_dict(kind: str) -> dict[str, np.ndarray]:
    """Made-up parameters: `kind` is that of layers 0 and 2, "h3" or "h3_conv"; layer 1 has attention."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def add(name, *shape, scale=0.4, offset=0.0):
        arrays[name] = (offset + scale * rng.normal(size=shape)).astype(np.float32)

    def dense(prefix, inputs, outputs):
        add(f"{prefix}.weight", outputs, inputs)
        add(f"{prefix}.bias", outputs)

    def norm(prefix):
        add(f"{prefix}.weight", D, offset=1.0)
        add(f"{prefix}.bias", D)

    add("backbone.embeddings.word_embeddings.weight", VOCAB, D)
    arrays["lm_head.weight"] = arrays["backbone.embeddings.word_embeddings.weight"]
    norm("backbone.ln_f")
    for layer in range(LAYERS):
        prefix = f"backbone.layers.{layer}"
        norm(f"{prefix}.norm1")
        norm(f"{prefix}.norm2")
        dense(f"{prefix}.mlp.fc1", D, 4 * D)
        dense(f"{prefix}.mlp.fc2", 4 * D, D)
        mixer = f"{prefix}.mixer"
        if layer == 1:
            dense(f"{mixer}.Wqkv", D, 3 * D)
            dense(f"{mixer}.out_proj", D, D)
            continue
        for name in ("q_proj", "k_proj", "v_proj", "output_linear"):
            dense(f"{mixer}.{name}", D, D)
        add(f"{mixer}.D", D)
        if kind == "h3_conv":
            add(f"{mixer}.k_kernel.kernel", 1, D, TAPS)
            add(f"{mixer}.kernel.kernel", 1, D, TAPS)
            add(f"{mixer}.k_D", D)
        else:
            add(f"{mixer}.ssm_k_D", D)
            add(f"{mixer}.ssm_k_kernel.kernel.B", D, STATE)
            add(f"{mixer}.ssm_k_kernel.kernel.C", 1, D, STATE)
            add(f"{mixer}.kernel.kernel.C", 1, D, STATE // 2, 2)
            add(f"{mixer}.kernel.kernel.B", D, STATE // 2, 2)
            add(f"{mixer}.kernel.kernel.log_dt", D, offset=-2.0)
            add(f"{mixer}.kernel.kernel.inv_A_real", D, STATE // 2)
            add(f"{mixer}.kernel.kernel.A_imag", D, STATE // 2, scale=3.0)
    return arrays


def logits(arrays: dict[str, np.ndarray], tokens: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """Of one sequence of tokens, (L, VOCAB)."""
    p = {name: array.astype(np.float64) for name, array in arrays.items()}
    x = p["backbone.embeddings.word_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        prefix = f"backbone.layers.{layer}"
        h = _norm(p, f"{prefix}.norm1", x)
        x = x + (_attention if layer == 1 else _h3)(p, f"{prefix}.mixer", h, threshold)
        h = _dense(p, f"{prefix}.mlp.fc1", _norm(p, f"{prefix}.norm2", x))
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + _dense(p, f"{prefix}.mlp.fc2", h)
    return _norm(p, "backbone.ln_f", x) @ p["backbone.embeddings.word_embeddings.weight"].T


def _h3(p, prefix, x, threshold):
    q, k, v = (_dense(p, f"{prefix}.{name}", x) for name in ("q_proj", "k_proj", "v_proj"))
    if f"{prefix}.k_kernel.kernel" in p:
        k = _convolve(k, _squash(p[f"{prefix}.k_kernel.kernel"][0], threshold)) + p[f"{prefix}.k_D"] * k
        kv = k * v
        y = _convolve(kv, _squash(p[f"{prefix}.kernel.kernel"][0], threshold))
    else:
        k = _shift(p, f"{prefix}.ssm_k_kernel.kernel", k) + p[f"{prefix}.ssm_k_D"] * k
        kv = k * v
        y = _diagonal(p, f"{prefix}.kernel.kernel", kv)
    return _dense(p, f"{prefix}.output_linear", q * (y + p[f"{prefix}.D"] * kv))


def _convolve(u, kernel):
    return np.stack([np.convolve(u[:, d], kernel[d])[: len(u)] for d in range(D)], -1)


def _shift(p, prefix, u):
    state, outputs = np.zeros((D, STATE)), []
    for u_t in u:
        state = np.pad(state, ((0, 0), (1, 0)))[:, :-1] + p[f"{prefix}.B"] * u_t[:, None]
        outputs.append((p[f"{prefix}.C"][0] * state).sum(-1))
    return np.stack(outputs)


def _diagonal(p, prefix, u):
    step = np.exp(p[f"{prefix}.log_dt"])[:, None]
    a = step * (-np.exp(p[f"{prefix}.inv_A_real"]) + 1j * p[f"{prefix}.A_imag"])
    b, c = ((pairs[..., 0] + 1j * pairs[..., 1]) for pairs in (p[f"{prefix}.B"], p[f"{prefix}.C"][0]))
    state, outputs = np.zeros(a.shape, complex), []
    for u_t in u:
        state = (1 + a / 2) / (1 - a / 2) * state + step * b / (1 - a / 2) * u_t[:, None]
        outputs.append(2 * (c * state).sum(-1).real)
    return np.stack(outputs)


def _attention(p, prefix, x, threshold):
    q, k, v = _dense(p, f"{prefix}.Wqkv", x).reshape(len(x), 3, HEADS, D // HEADS).transpose(1, 2, 0, 3)
    products = q @ k.transpose(0, 2, 1) / np.sqrt(D // HEADS)
    products[:, *np.triu_indices(len(x), 1)] = -np.inf
    weights = np.exp(products - products.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return _dense(p, f"{prefix}.out_proj", mixed.transpose(1, 0, 2).reshape(len(x), D))


def _squash(kernel, threshold):
    return np.sign(kernel) * np.maximum(np.abs(kernel) - threshold, 0)


def _dense(p, prefix, x):
    return x @ p[f"{prefix}.weight"].T + p[f"{prefix}.bias"]


def _norm(p, prefix, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{prefix}.weight"] + p[f"{prefix}.bias"]
