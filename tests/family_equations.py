"""Families that transformers does not have, by their equations in numpy: token by token, head by head, in float64."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from family_comparison import write_folder
from safetensors.numpy import load_file

from maxlm.interop.huggingface import load_huggingface, read_description, write_huggingface

EMBED, HEADS, LAYERS, EPSILON = 24, 6, 2, 1e-5
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
BAICHUAN = TOKENS | {
    "model_type": "baichuan",
    "hidden_act": "silu",
    "hidden_size": EMBED,
    "intermediate_size": 20,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "rms_norm_eps": EPSILON,
}
CHATGLM = TOKENS | {
    "model_type": "chatglm",
    "hidden_size": EMBED,
    "ffn_hidden_size": 20,
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "kv_channels": 8,
    "layernorm_epsilon": EPSILON,
    "padded_vocab_size": 199,
    "seq_length": 32,
    "multi_query_attention": True,
    "multi_query_group_num": 3,
    "add_qkv_bias": True,
}
CASES: dict[str, dict[str, Any]] = {
    "baichuan, 7B": BAICHUAN | {"vocab_size": 64_000, "max_position_embeddings": 32},
    "baichuan, 13B": BAICHUAN | {"vocab_size": 64_000, "model_max_length": 32},
    "baichuan 2, 7B": BAICHUAN
    | {"vocab_size": 125_696, "max_position_embeddings": 32, "model_max_length": 32, "z_loss_weight": 0},
    "baichuan 2, 13B": BAICHUAN | {"vocab_size": 125_696, "model_max_length": 32, "z_loss_weight": 0},
    "chatglm 2 and 3": CHATGLM,
    "chatglm, GLM-4 for longer texts": CHATGLM | {"rope_ratio": 500, "num_hidden_layers": LAYERS},
    "chatglm 2, one key head, no biases": CHATGLM | {"multi_query_group_num": 1, "add_qkv_bias": False},
}
# Of six heads: those of four, and every other one of eight.
SLOPES = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale


def gated(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def attention(query, key, value, rotate, slopes):
    """[T, H, C], and keys and values of groups of heads."""
    group = query.shape[1] // key.shape[1]
    mixed = np.zeros_like(query)
    for i, head in np.ndindex(query.shape[:2]):
        q, keys = query[i, head], key[: i + 1, head // group]
        q, keys = rotate(q, i), np.array([rotate(k, j) for j, k in enumerate(keys)])
        logits = keys @ q / np.sqrt(len(q)) + slopes[head] * np.arange(i + 1)
        weights = np.exp(logits - logits.max())
        mixed[i, head] = weights @ value[: i + 1, head // group] / weights.sum()
    return mixed.reshape(len(query), -1)


def rotate_halves(x, position):
    """Of a head of four channels, 0 rotates with 2 by `position`, and 1 with 3 by position / 100."""
    angles = position * np.array([1, 10_000**-0.5])
    first, second = x[:2], x[2:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def rotate_neighbors(x, position, base):
    """Of a head of eight channels, 0 rotates with 1, 2 with 3, and the others do not."""
    rotated = x.copy()
    for pair in range(2):
        angle = position * base ** (-pair / 2)
        first, second = x[2 * pair : 2 * pair + 2]
        rotated[2 * pair] = first * np.cos(angle) - second * np.sin(angle)
        rotated[2 * pair + 1] = second * np.cos(angle) + first * np.sin(angle)
    return rotated


def baichuan_logits(tensors, tokens, settings):
    w = {name.removeprefix("model."): tensor.astype("float64") for name, tensor in tensors.items()}
    is_7b = "max_position_embeddings" in settings
    rotate, slopes = (rotate_halves, [0] * HEADS) if is_7b else (lambda x, position: x, SLOPES)
    x = w["embed_tokens.weight"][tokens]
    for number in range(LAYERS):
        own = {name.split(".", 2)[2]: each for name, each in w.items() if name.startswith(f"layers.{number}.")}
        packed = norm(x, own["input_layernorm.weight"]) @ own["self_attn.W_pack.weight"].T
        qkv = np.split(packed.reshape(len(x), 3 * HEADS, -1), 3, axis=1)
        x = x + attention(*qkv, rotate, slopes) @ own["self_attn.o_proj.weight"].T
        before = norm(x, own["post_attention_layernorm.weight"])
        gate, up = (before @ own[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + gated(gate, up) @ own["mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if settings["vocab_size"] == 125_696:
        head = head / np.linalg.norm(head, axis=-1, keepdims=True)
    return norm(x, w["norm.weight"]) @ head.T


def chatglm_logits(tensors, tokens, settings):
    w = {name.removeprefix("transformer."): tensor.astype("float64") for name, tensor in tensors.items()}
    channels, base = settings["kv_channels"], 10_000 * settings.get("rope_ratio", 1)
    groups = settings["multi_query_group_num"]
    x = w["embedding.word_embeddings.weight"][tokens]
    for number in range(LAYERS):
        start = f"encoder.layers.{number}."
        own = {name.removeprefix(start): each for name, each in w.items() if name.startswith(start)}
        packed = norm(x, own["input_layernorm.weight"]) @ own["self_attention.query_key_value.weight"].T
        packed = packed + own.get("self_attention.query_key_value.bias", 0)
        qkv = np.split(packed.reshape(len(x), -1, channels), [HEADS, HEADS + groups], axis=1)
        mixed = attention(*qkv, lambda x, position: rotate_neighbors(x, position, base), [0] * HEADS)
        x = x + mixed @ own["self_attention.dense.weight"].T
        gate, up = np.split(norm(x, own["post_attention_layernorm.weight"]) @ own["mlp.dense_h_to_4h.weight"].T, 2, -1)
        x = x + gated(gate, up) @ own["mlp.dense_4h_to_h.weight"].T
    return norm(x, w["encoder.final_layernorm.weight"]) @ w["output_layer.weight"].T


@dataclass(frozen=True)
class EquationComparison:
    """Largest absolute differences of logits; whether tensors and settings are exported as they were."""

    logits: float
    cached_logits: float
    same_tensors: bool
    same_model: bool


def compare_with_equations(name: str, folder: Path) -> EquationComparison:
    """Compare a case with its equations. `folder`: an empty one."""
    settings = CASES[name]
    tensors = write_folder(folder, settings)
    model, _ = load_huggingface(folder)
    tokens = np.random.default_rng(0).integers(3, 190, 12).astype(np.int32)
    equations = {"baichuan": baichuan_logits, "chatglm": chatglm_logits}[settings["model_type"]]
    expected = equations(tensors, tokens, settings)
    assert np.ptp(expected) > 1
    logits = jax.jit(lambda model: model.logits(model(tokens[None]).hidden_BLD))(model)[0]

    @jax.jit
    def next_logits(model, token, position, caches):
        output = model(token[None, None], positions_BL=position[None, None], caches=caches)
        return model.logits(output.hidden_BLD)[0, 0], output.caches

    caches, cached = model.create_caches(1, len(tokens), "float32"), []
    for position, token in enumerate(tokens):
        one, caches = next_logits(model, token, np.int32(position), caches)
        cached.append(one)

    out = folder / "out"
    out.mkdir()
    write_huggingface(out, model, None, {})
    written = load_file(out / "model.safetensors")
    return EquationComparison(
        logits=float(np.abs(logits - expected).max()),
        cached_logits=float(np.abs(np.array(cached) - expected).max()),
        same_tensors=written.keys() == tensors.keys()
        and all(np.array_equal(written[path], tensor) for path, tensor in tensors.items()),
        same_model=read_description(out) == read_description(folder),
    )
