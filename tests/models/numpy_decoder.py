"""Reference decoder in numpy float64, token by token and head by head, written from the papers."""

import math

import numpy as np


def rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def layer_norm(x, scale, bias=0.0, *, epsilon):
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


def rotate(x, position, rope, length, prefix=0):
    """RoPE of one head's vector: of its first R channels, i rotates with i + R/2 by position * theta^(-2i/R)."""
    half = int(len(x) * rope.share) // 2
    out = x.copy()
    if rope.two_dimensional:
        for i in range(half):
            place = min(position, max(prefix - 1, 0)) if i < half // 2 else max(position - prefix + 1, 0)
            turned = (x[i] + 1j * x[i + half]) * np.exp(1j * place * rope.theta ** (-(i % (half // 2)) / (half // 2)))
            out[i], out[i + half] = turned.real, turned.imag
        return out
    kind, factor = getattr(rope.scaling, "kind", None), 1
    for i in range(half):
        theta, slower = rope.theta, 1
        if kind == "linear":
            slower = rope.scaling.factor
        elif kind == "dynamic" and length > rope.scaling.original_length:
            longer = rope.scaling.factor * length / rope.scaling.original_length - (rope.scaling.factor - 1)
            theta *= longer ** (half / (half - 1))
        elif kind == "longrope":
            is_long, factor = length > rope.scaling.original_length, rope.scaling.attention_factor
            slower = (rope.scaling.long_factors if is_long else rope.scaling.short_factors)[i]
        angle = position * theta ** (-i / half) / slower
        out[i] = factor * (x[i] * np.cos(angle) - x[i + half] * np.sin(angle))
        out[i + half] = factor * (x[i + half] * np.cos(angle) + x[i] * np.sin(angle))
    return out


def lengths_of(positions, segments):
    """The length of each token's document."""
    return [1 + max(p for p, other in zip(positions, segments) if other == own) for own in segments]


def soft_cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def log_softmax(x):
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def logits_of_row(config, weights, tokens, positions=None, segments=None, prefix=None):
    """[length, vocab] for one row; `weights` holds arrays by path, as from `maxlm.core.tree.flatten`.

    prefix: for each token, the length of the prefix of its document.
    """
    w = {path: np.asarray(value, np.float64) for path, value in weights.items()}
    return head_of(config, w)(hidden_of_row(config, w, tokens, positions, segments, prefix))


def ahead_of_row(config, weights, tokens):
    """For each prediction module k = 1, 2, ... [length - k, vocab]: of the token k places after the next one, for one
    document. Equations 21 to 23 of arXiv:2412.19437, with both inputs in the order of the released weights."""
    w = {path: np.asarray(value, np.float64) for path, value in weights.items()}
    norm, hidden, logits = norm_of(config), hidden_of_row(config, w, tokens), []
    embedded = embeddings_of_row(config, w, tokens, np.arange(len(tokens)))
    for k in range(1, min(config.multi_token.modules, len(tokens) - 1) + 1):
        own, length = below(w, f"multi_token/{k - 1}"), len(tokens) - k
        inputs = norm(embedded[k:], below(own, "embedding_norm")), norm(hidden[:length], below(own, "hidden_norm"))
        h = np.concatenate(inputs, axis=-1) @ own["project"]
        places = np.arange(length), np.ones(length, int), np.zeros(length, int)
        h = residual_layer(config, config.multi_token.layer, below(own, "layer") | shared_of(w), h, *places)
        hidden = norm(h, below(own, "final_norm"))
        logits.append(head_of(config, w)(hidden))
    return logits


def norm_of(config):
    """(vectors, own weights) -> the vectors normalized."""
    epsilon = config.norm.epsilon

    def norm(x, own):
        if config.norm.unit_offset:
            own = own | {"scale": 1 + own["scale"]}
        return (
            rms_norm(x, own["scale"], epsilon) if config.norm.kind == "rms" else layer_norm(x, **own, epsilon=epsilon)
        )

    return norm


def embeddings_of_row(config, w, tokens, positions):
    x = w["embedding"][tokens] * (config.embedding_scale or 1)
    x = x + w["positions"][positions] if config.learned_positions else x
    return norm_of(config)(x, below(w, "embedding_norm")) if config.embedding_norm else x


def hidden_of_row(config, w, tokens, positions=None, segments=None, prefix=None):
    """[length, width], after the final norm."""
    positions = np.arange(len(tokens)) if positions is None else positions
    segments = np.ones(len(tokens), int) if segments is None else segments
    prefix = np.zeros(len(tokens), int) if prefix is None else prefix
    x = embeddings_of_row(config, w, tokens, positions)
    for layer, own in layers_in_order(config, w):
        x = residual_layer(config, layer, own | shared_of(w), x, positions, segments, prefix)
    return norm_of(config)(x, below(w, "final_norm"))


def shared_of(w):
    """The weights of a layer that are the same for all."""
    return {"mixer/relative_bias": w["relative_bias"]} if "relative_bias" in w else {}


def residual_layer(config, layer, own, x, positions, segments, prefix):
    norm = norm_of(config)

    def norm_if_any(x, own):
        return norm(x, own) if own else x

    mixer = {"attention": attention, "mla": latent_attention, "gru": gru}[layer.mixer.kind]
    before = norm_if_any(x, below(own, "mixer_norm"))
    mixed = mixer(layer.mixer, below(own, "mixer"), before, positions, segments, prefix, norm)
    x, factor = (before if config.residual == "normalized" else x), config.residual_factor
    after = factor * x + norm_if_any(mixed, below(own, "mixer_output_norm"))
    reads = {"parallel": x, "parallel_one_norm": before}.get(config.residual, after)
    reads = norm_if_any(reads, below(own, "mlp_norm"))
    mlp = {"gated": gated_mlp, "plain": plain_mlp, "moe": mixture_of_experts}[layer.mlp.kind]
    added = mlp(layer.mlp, below(own, "mlp"), reads)
    after = reads if config.residual == "normalized" else after
    return factor * after + norm_if_any(added, below(own, "mlp_output_norm"))


def head_of(config, w):
    """hidden states -> logits."""
    head = w["embedding" if config.tie_embeddings else "head"]
    if config.normalized_head:
        head = head / np.sqrt((head**2).sum(-1, keepdims=True))
    return lambda x: soft_cap(x @ head.T, config.logit_soft_cap)


def layers_in_order(config, weights):
    """(configuration, weights by path within the layer) of each layer, from the input to the output."""
    for number, group in enumerate(config.layers):
        for repeat in range(group.repeat):
            for position, layer in enumerate(group.pattern):
                stacked = below(weights, f"layers/{number}/{position}")
                for time in range(layer.times):
                    place = repeat if layer.times == 1 else (repeat, time)
                    yield layer, {path: value[place] for path, value in stacked.items()}


def below(weights, path):
    return {name[len(path) + 1 :]: value for name, value in weights.items() if name.startswith(f"{path}/")}


def sees(i, j, positions, segments, prefix, window):
    """Whether token i of a row attends to token j."""
    is_prefix = positions[i] < prefix[i] and positions[j] < prefix[j]
    is_near = window is None or abs(i - j) < window
    return segments[j] == segments[i] != 0 and (j <= i or is_prefix) and is_near


def attention(config, w, h, positions, segments, prefix, norm):
    length, heads, kv_heads, dim = len(h), config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v = (h @ w[name] + w.get(f"{name}_bias", 0) for name in ("query", "key", "value"))
    if config.qk_norm and config.qk_norm_over == "all_heads":
        q, k = norm(q, below(w, "query_norm")), norm(k, below(w, "key_norm"))
    q, k, v = q.reshape(length, heads, dim), k.reshape(length, kv_heads, dim), v.reshape(length, kv_heads, dim)
    if config.qk_norm and config.qk_norm_over == "head":
        q, k = norm(q, below(w, "query_norm")), norm(k, below(w, "key_norm"))
    lengths = lengths_of(positions, segments)
    place = lambda i: (positions[i], config.rope, lengths[i], prefix[i])  # noqa: E731
    turn = lambda x, i: x if config.rope is None else rotate(x, *place(i))  # noqa: E731
    scale = config.scale or 1 / np.sqrt(dim)
    mixed = np.zeros((length, heads, dim))
    for n in range(heads):
        shared = n // (heads // kv_heads)
        turned = [turn(k[j, shared], j) for j in range(length)]
        for i in range(length):
            seen = [j for j in range(length) if sees(i, j, positions, segments, prefix, config.window)]
            if not seen:
                continue
            query = turn(q[i, n], i)
            scores = soft_cap(np.array([query @ turned[j] * scale for j in seen]), config.soft_cap)
            if config.alibi:
                scores -= config.alibi_scale * ALIBI_SLOPES[heads][n] * abs(i - np.array(seen))
            if config.relative_bias:
                scores += [w["relative_bias"][bucket_of(i - j, config.relative_bias), n] for j in seen]
            values = v[seen, shared]
            if config.virtual_tokens:
                of_virtual = [w[f"virtual_{name}"].reshape(-1, kv_heads, dim)[:, shared] for name in ("key", "value")]
                scores = np.append(scores, soft_cap(of_virtual[0] @ query * scale, config.soft_cap))
                values = np.concatenate([values, of_virtual[1]])
            if config.sinks:
                scores = np.append(scores, w["sinks"][n])
            mixed[i, n] = softmax(scores)[: len(values)] @ values
    return mixed.reshape(length, heads * dim) @ w["out"] + w.get("out_bias", 0)


def latent_attention(config, w, h, positions, segments, prefix, norm):
    """Equations 9 to 19 of arXiv:2405.04434, and biases; `norm` is not that of the latents."""
    length, heads, content = len(h), config.num_heads, config.content_dim
    query = h
    if config.query_rank is not None:
        down = h @ w["query_down"] + w.get("query_down_bias", 0)
        query = rms_norm(down, w["query_norm/scale"], config.norm_epsilon)
    q = (query @ w["query"]).reshape(length, heads, content + config.rope_dim)
    latent = rms_norm(h @ w["latent"] + w.get("latent_bias", 0), w["latent_norm/scale"], config.norm_epsilon)
    shared = h @ w["rope_key"] + w.get("rope_key_bias", 0)
    k = (latent @ w["key"]).reshape(length, heads, content)
    v = (latent @ w["value"]).reshape(length, heads, config.value_dim)
    scale = config.scale or 1 / np.sqrt(content + config.rope_dim)
    lengths = lengths_of(positions, segments)
    turn = lambda x, i: rotate(x, positions[i], config.rope, lengths[i])  # noqa: E731
    mixed = np.zeros((length, heads, config.value_dim))
    for i in range(length):
        seen = [j for j in range(length) if sees(i, j, positions, segments, prefix, None)]
        for n in range(heads if seen else 0):
            turned = turn(q[i, n, content:], i)
            scores = [q[i, n, :content] @ k[j, n] + turned @ turn(shared[j], j) for j in seen]
            mixed[i, n] = softmax(scale * np.array(scores)) @ v[seen, n]
    return mixed.reshape(length, -1) @ w["out"] + w.get("out_bias", 0)


# Of the paper's release, for four heads and for six.
ALIBI_SLOPES = {
    4: [2**-2, 2**-4, 2**-6, 2**-8],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
}


# The first distance of each bucket, as T5's code in transformers counts them, for (buckets, max_distance).
BUCKET_STARTS = {(6, 10): [0, 1, 2, 3, 5, 7]}


def bucket_of(distance, settings):
    starts = BUCKET_STARTS[settings.buckets, settings.max_distance]
    return sum(start <= max(distance, 0) for start in starts) - 1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(config, w, h, positions, segments, prefix, norm):
    """torch.nn.GRU's equations, one gate and one token at a time."""
    size, state, before, states = config.dim, np.zeros(config.dim), 0, []
    for i, token in enumerate(h):
        if segments[i] != before:
            state = np.zeros(size)
        before = segments[i]
        reset, update, new = np.split(token @ w["input"] + w["input_bias"], 3)
        reset_h, update_h, new_h = np.split(state @ w["recurrent"] + w["recurrent_bias"], 3)
        z = sigmoid(update + update_h)
        candidate = np.tanh(new + sigmoid(reset + reset_h) * new_h)
        state = (1 - z) * candidate + z * state if segments[i] else state
        states.append(state)
    return np.array(states) @ w["out"]


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def plain_mlp(config, w, h):
    return gelu(h @ w["up"] + w["up_bias"]) @ w["down"] + w["down_bias"]


def gated_mlp(config, w, h):
    gate = h @ w["gate"]
    gate = gelu(gate) if getattr(config, "activation", "silu") == "gelu" else gate * sigmoid(gate)
    return (gate * (h @ w["up"])) @ w["down"]


EXPERT_WEIGHTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def expert_mlp(config, w, h):
    gate, up = (h @ w[name] + w.get(f"{name}_bias", 0) for name in ("gate", "up"))
    if (limit := config.swiglu_limit) is None:
        hidden = gate * sigmoid(gate) * up
    else:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        hidden = gate * sigmoid(1.702 * gate) * (up + 1)
    return hidden @ w["down"] + w.get("down_bias", 0)


def mixture_of_experts(config, w, h):
    """Each token through its experts; the bias selects experts and has no part in their weights (arXiv:2408.15664)."""
    out = np.zeros_like(h)
    bias = w.get("router_bias", np.zeros(config.num_experts))
    for i, token in enumerate(h):
        logits = token @ w["router"] + w.get("router_logit_bias", 0)
        scores = softmax(logits) if config.scoring == "softmax" else 1 / (1 + np.exp(-logits))
        by_group = np.split(scores + bias, config.num_groups)
        count = {"best": 1, "best_two": 2}[config.group_score]
        group_scores = [np.sort(group)[-count:].sum() for group in by_group]
        groups = np.argsort(group_scores)[-config.groups_per_token :]
        size = config.num_experts // config.num_groups
        allowed = [expert for expert in range(config.num_experts) if expert // size in groups]
        chosen = sorted(allowed, key=lambda expert: -(scores + bias)[expert])[: config.experts_per_token]
        total = scores[chosen].sum() if config.normalize_weights else 1.0
        for expert in chosen:
            own = {name: w[name][expert] for name in EXPERT_WEIGHTS if name in w}
            out[i] += config.routed_scaling * scores[expert] / total * expert_mlp(config, own, token)
    if not config.num_shared_experts:
        return out
    shared = gated_mlp(config, below(w, "shared"), h)
    return out + (sigmoid(h @ w["shared_gate"]) * shared if config.shared_gate else shared)
