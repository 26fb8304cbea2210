"""Reference decoder in numpy float64, token by token and head by head, written from the papers."""

import numpy as np


def rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def rotate(x, position, theta):
    """RoPE of one head's vector: channel i rotates with channel i + D/2 by position * theta^(-2i/D)."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def soft_cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def log_softmax(x):
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def logits_of_row(config, weights, tokens, positions=None, segments=None):
    """[length, vocab] for one row; `weights` holds arrays by path, as from `maxlm.core.tree.flatten`."""
    w = {path: np.asarray(value, np.float64) for path, value in weights.items()}
    length = len(tokens)
    positions = np.arange(length) if positions is None else positions
    segments = np.ones(length, int) if segments is None else segments
    heads, kv_heads, dim, epsilon = config.num_heads, config.num_kv_heads, config.head_dim, config.norm_epsilon
    x = w["embedding"][tokens]
    for layer in range(config.num_layers):
        window = config.window_pattern[layer % len(config.window_pattern)]
        weight = lambda name, layer=layer: w[f"layers/{name}"][layer]  # noqa: E731
        h = rms_norm(x, weight("attention_norm"), epsilon)
        q = (h @ weight("attention/query")).reshape(length, heads, dim)
        k = (h @ weight("attention/key")).reshape(length, kv_heads, dim)
        v = (h @ weight("attention/value")).reshape(length, kv_heads, dim)
        if config.qk_norm:
            q = rms_norm(q, weight("attention/query_norm"), epsilon)
            k = rms_norm(k, weight("attention/key_norm"), epsilon)
        mixed = np.zeros((length, heads, dim))
        for n in range(heads):
            shared = n // (heads // kv_heads)
            turned = [rotate(k[j, shared], positions[j], config.rope_theta) for j in range(length)]
            for i in range(length):
                seen = [
                    j for j in range(i + 1) if segments[j] == segments[i] != 0 and (window is None or i - j < window)
                ]
                if not seen:
                    continue
                query = rotate(q[i, n], positions[i], config.rope_theta)
                scores = np.array([query @ turned[j] / np.sqrt(dim) for j in seen])
                mixed[i, n] = softmax(soft_cap(scores, config.attention_soft_cap)) @ v[seen, shared]
        x = x + mixed.reshape(length, heads * dim) @ weight("attention/out")
        h = rms_norm(x, weight("mlp_norm"), epsilon)
        gate = h @ weight("mlp/gate")
        x = x + (gate / (1 + np.exp(-gate)) * (h @ weight("mlp/up"))) @ weight("mlp/down")
    x = rms_norm(x, w["final_norm"], epsilon)
    return soft_cap(x @ w["embedding" if config.tie_embeddings else "head"].T, config.logit_soft_cap)
