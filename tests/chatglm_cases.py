"""Tiny models of ChatGLM: config.json as its authors' code writes it, and inputs.

`tools/chatglm_goldens.py` computes their logits, loss, gradient and greedy text with that code.
"""

from typing import Any

import numpy as np
from drawn_weights import inputs

GMASK, START = 65, 66
COMMON = {
    "model_type": "chatglm",
    "hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 3,
    "layernorm_epsilon": 1e-5,
    "torch_dtype": "float32",
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FIRST = {
    **COMMON,
    "vocab_size": 67,
    "inner_hidden_size": 40,
    "max_sequence_length": 64,
    "position_encoding_2d": True,
    "bos_token_id": START,
    "mask_token_id": 64,
    "gmask_token_id": GMASK,
}
LATER = {
    **COMMON,
    "padded_vocab_size": 67,
    "ffn_hidden_size": 40,
    "kv_channels": 16,
    "seq_length": 64,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 1,
    "original_rope": True,
    "bos_token_id": 1,
}
CASES: dict[str, dict[str, Any]] = {
    "chatglm, first": FIRST,
    "chatglm, first, untied, one layer": {**FIRST, "num_layers": 1, "tie_word_embeddings": False},
    "chatglm 2": LATER,
    "chatglm 2, as many key heads, no biases": {
        **LATER,
        "multi_query_group_num": 3,
        "kv_channels": 24,
        "add_qkv_bias": False,
    },
}


def rows() -> tuple[list[np.ndarray], list[int]]:
    """Two texts of different lengths, and the length of the prefix of each, which ends with a mask token."""
    tokens, mask = inputs()
    texts = [row[own == 1] % 64 for row, own in zip(tokens, mask)]
    prefix_lengths = [10, 5]
    for text, length in zip(texts, prefix_lengths):
        text[length - 1 : length + 1] = GMASK, START
    return texts, prefix_lengths
