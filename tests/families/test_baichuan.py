"""Baichuan, which transformers does not have, against its equations in numpy, token by token and head by head."""

import jax
import numpy as np
import pytest
from family_comparison import write_folder
from safetensors.numpy import load_file

from maxlm.errors import CheckpointError
from maxlm.interop.huggingface import load_huggingface, read_description, write_huggingface

EMBED, HEADS, LAYERS, EPSILON = 24, 6, 2, 1e-5
HEAD_DIM = EMBED // HEADS
COMMON = {
    "model_type": "baichuan",
    "hidden_act": "silu",
    "hidden_size": EMBED,
    "intermediate_size": 20,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "rms_norm_eps": EPSILON,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES = {
    "7B": {"vocab_size": 64_000, "max_position_embeddings": 32},
    "13B": {"vocab_size": 64_000, "model_max_length": 32},
    "2, 7B": {"vocab_size": 125_696, "max_position_embeddings": 32, "model_max_length": 32, "z_loss_weight": 0},
    "2, 13B": {"vocab_size": 125_696, "model_max_length": 32, "z_loss_weight": 0},
}
# Of six heads: those of four, and every other one of eight.
SLOPES = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale


def rotate(x, position):
    """Of a head of four channels, 0 rotates with 2 by `position`, and 1 with 3 by position / 100."""
    angles = position * np.array([1, 10_000**-0.5])
    first, second = x[:2], x[2:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def attention(x, packed, out, has_rope):
    query, key, value = np.split((x @ packed.T).reshape(len(x), 3 * HEADS, HEAD_DIM), 3, axis=1)
    mixed = np.zeros_like(value)
    for i, head in np.ndindex(len(x), HEADS):
        keys, q = key[: i + 1, head], query[i, head]
        if has_rope:
            q, keys = rotate(q, i), np.array([rotate(k, j) for j, k in enumerate(keys)])
        logits = keys @ q / np.sqrt(HEAD_DIM)
        if not has_rope:
            logits = logits + SLOPES[head] * np.arange(i + 1)
        weights = np.exp(logits - logits.max())
        mixed[i, head] = weights @ value[: i + 1, head] / weights.sum()
    return mixed.reshape(len(x), -1) @ out.T


def logits_by_equations(tensors, tokens, *, has_rope, has_unit_rows):
    w = {name.removeprefix("model."): tensor.astype("float64") for name, tensor in tensors.items()}
    x = w["embed_tokens.weight"][tokens]
    for number in range(LAYERS):
        own = {name.split(".", 2)[2]: each for name, each in w.items() if name.startswith(f"layers.{number}.")}
        before = norm(x, own["input_layernorm.weight"])
        x = x + attention(before, own["self_attn.W_pack.weight"], own["self_attn.o_proj.weight"], has_rope)
        before = norm(x, own["post_attention_layernorm.weight"])
        gate, up = (before @ own[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ own["mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if has_unit_rows:
        head = head / np.linalg.norm(head, axis=-1, keepdims=True)
    return norm(x, w["norm.weight"]) @ head.T


@pytest.mark.parametrize("name", CASES)
def test_same_as_equations_both_ways(name, tmp_path):
    tensors = write_folder(tmp_path, COMMON | CASES[name])
    model, _ = load_huggingface(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 60_000, 12).astype(np.int32)
    expected = logits_by_equations(
        tensors, tokens, has_rope="7B" in name, has_unit_rows=CASES[name]["vocab_size"] == 125_696
    )
    assert np.ptp(expected) > 1
    logits = jax.jit(lambda model: model.logits(model(tokens[None]).hidden_BLD))(model)
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)

    @jax.jit
    def next_logits(model, token, position, caches):
        output = model(token[None, None], positions_BL=position[None, None], caches=caches)
        return model.logits(output.hidden_BLD)[0, 0], output.caches

    caches = model.create_caches(1, len(tokens), "float32")
    for position, token in enumerate(tokens):
        logits, caches = next_logits(model, token, np.int32(position), caches)
        np.testing.assert_allclose(logits, expected[position], atol=1e-4)

    out = tmp_path / "out"
    out.mkdir()
    write_huggingface(out, model, None, {})
    assert read_description(out) == read_description(tmp_path)
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    for path, tensor in tensors.items():
        np.testing.assert_array_equal(written[path], tensor)


def test_length_that_is_missing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="model_max_length is missing"):
        write_folder(tmp_path, COMMON | {"vocab_size": 64_000})


@pytest.mark.parametrize(("changes", "is_normalized"), [({}, False), ({"z_loss_weight": 0}, True)])
def test_other_vocabularies_are_of_the_generation_that_the_settings_are_of(changes, is_normalized, tmp_path):
    write_folder(tmp_path, COMMON | {"vocab_size": 199, "max_position_embeddings": 32} | changes)
    model, _ = load_huggingface(tmp_path)
    assert model.config.normalized_head == is_normalized
