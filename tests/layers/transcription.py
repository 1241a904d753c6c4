"""The layer and the model in NumPy, float64, one line for each line of the paper's method; no FFT, no sharing."""

import numpy as np
from scipy.special import erf


def long_conv_layer(params, x, *, channels, bidirectional=False, threshold=0.0, width=1, lengths=None):
    """x (B, L, D) -> (B, L, D)."""
    params = {name: to_float64(value) for name, value in params.items()}
    batch, length, features = x.shape
    u = np.array(x, np.float64)
    if lengths is not None:
        for b in range(batch):
            u[b, lengths[b] :] = 0
    k = smooth(params["kernel"], width)
    k = np.sign(k) * np.maximum(np.abs(k) - threshold, 0)
    k0, k1 = (k[:channels], k[channels:]) if bidirectional else (k, None)

    y = np.zeros((batch, channels, features, length))
    for t in range(length):
        for s in range(length):
            if 0 <= t - s < k0.shape[-1]:
                y[..., t] += k0[..., t - s] * u[:, None, s, :]
            if k1 is not None and 0 <= s - t - 1 < k1.shape[-1]:
                y[..., t] += k1[..., s - t - 1] * u[:, None, s, :]
    y += params["skip"][:, :, None] * u.transpose(0, 2, 1)[:, None]

    h = np.zeros((batch, length, channels * features))
    for c in range(channels):
        for d in range(features):
            h[..., c * features + d] = y[:, c, d]
    h = h * (1 + erf(h / np.sqrt(2))) / 2
    h = h @ params["output"]["kernel"] + params["output"]["bias"]
    return h[..., :features] / (1 + np.exp(-h[..., features:]))


def smooth(kernel, width):
    padded = np.pad(kernel, ((0, 0), (0, 0), (width // 2, width // 2)))
    return sum(padded[..., i : i + kernel.shape[-1]] for i in range(width)) / width


def normalize(params, x, axes):
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def classifier(params, x, *, channels, num_layers, prenorm, norm, decoder, threshold, lengths=None):
    """x (B, L, d_in), integer tokens (B, L), or for retrieval two documents on axis 1, to logits."""
    params = to_float64(params)
    retrieval = decoder == "retrieval"
    if retrieval:
        pairs = x.shape[0]
        x = np.concatenate([x[:, 0], x[:, 1]])
        lengths = None if lengths is None else np.concatenate([lengths[:, 0], lengths[:, 1]])
    encoder = params["encoder"]
    h = encoder["embedding"][x] if "embedding" in encoder else x @ encoder["kernel"] + encoder["bias"]
    axes = (-1,) if norm == "layer" else (0, 1)
    for i in range(num_layers):
        block = index(params["blocks"], i)
        inside = normalize(block["norm"], h, axes) if prenorm else h
        h = h + long_conv_layer(block["layer"], inside, channels=channels, threshold=threshold, lengths=lengths)
        h = h if prenorm else normalize(block["norm"], h, axes)
    if prenorm:
        h = normalize(params["final_norm"], h, axes)
    ends = [h.shape[1]] * len(h) if lengths is None else lengths
    last = decoder == "last"
    pooled = np.stack([row[end - 1] if last else row[:end].mean(0) for row, end in zip(h, ends, strict=True)])
    if retrieval:
        x1, x2 = pooled[:pairs], pooled[pairs:]
        z = np.concatenate([x1, x2, x1 - x2, x1 * x2], axis=-1) @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        pooled = z * (1 + erf(z / np.sqrt(2))) / 2
    return pooled @ params["head"]["kernel"] + params["head"]["bias"]


def to_float64(tree):
    return {k: to_float64(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)


def index(tree, i):
    return {k: index(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


def error(got, want):
    """Largest error over the largest value."""
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
