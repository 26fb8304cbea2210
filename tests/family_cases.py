"""Tiny models of each family: their config.json, as `transformers` or published checkpoints write it.

`tools/family_goldens.py` computes their logits, loss, gradient and greedy text with `transformers`.
"""

from typing import Any

TOKENS = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
STABLELM = {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = 6

CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "llama, old keys, tied, one layer": {
        "model_type": "llama",
        **LLAMA,
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "llama 3, biases, wide heads": {
        "model_type": "llama",
        **LLAMA,
        "head_dim": 16,
        "attention_bias": True,
        "rope_theta": 5000.0,
        "rope_scaling": LLAMA3_SCALING,
    },
    "llama, yarn": {
        "model_type": "llama",
        **LLAMA,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        },
    },
    "llama, as many key heads": {"model_type": "llama", **{k: v for k, v in LLAMA.items() if "key_value" not in k}},
    "mistral": {"model_type": "mistral", **LLAMA, "sliding_window": WINDOW},
    "mistral, window longer than the text": {"model_type": "mistral", **LLAMA, "sliding_window": 4096},
    "mixtral": {"model_type": "mixtral", **LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2", **LLAMA, "tie_word_embeddings": True},
    "qwen2, windows": {
        "model_type": "qwen2",
        **LLAMA,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **LLAMA, "head_dim": 16},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **LLAMA,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gemma": {"model_type": "gemma", **LLAMA, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        "model_type": "gemma2",
        **LLAMA,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **LLAMA,
        "num_hidden_layers": 7,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "glm": {"model_type": "glm", **LLAMA, "head_dim": 16, "attention_bias": True},
    "phi3": {"model_type": "phi3", **LLAMA, "sliding_window": WINDOW},
    "stablelm": {"model_type": "stablelm", **STABLELM, "partial_rotary_factor": 0.25},
    "stablelm, parallel": {
        "model_type": "stablelm",
        **STABLELM,
        "partial_rotary_factor": 0.5,
        "use_parallel_residual": True,
        "use_qkv_bias": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        **TOKENS,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        **TOKENS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
    },
    "gpt_neox, sequential": {
        "model_type": "gpt_neox",
        **TOKENS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "bloom": {"model_type": "bloom", **TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {
        "model_type": "falcon",
        **TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bias": False,
        "alibi": False,
    },
    "falcon, groups of heads, two norms": {
        "model_type": "falcon",
        **TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "max_position_embeddings": 64,
        "alibi": False,
    },
    "falcon, sequential, own key heads": {
        "model_type": "falcon",
        **TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "multi_query": False,
        "parallel_attn": False,
        "max_position_embeddings": 64,
        "bias": True,
        "alibi": False,
    },
    "falcon, groups of heads, one norm": {
        "model_type": "falcon",
        **TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
        "max_position_embeddings": 64,
        "bias": True,
        "alibi": False,
    },
}

# Reward models and classifiers: computed by the classes ...ForSequenceClassification.
SCORE_CASES: dict[str, dict[str, Any]] = {
    "llama, reward": {
        **CASES["llama"],
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
    },
    "qwen2, three classes": {
        **CASES["qwen2"],
        "architectures": ["Qwen2ForSequenceClassification"],
        "id2label": {"0": "bad", "1": "fair", "2": "good"},
        "label2id": {"bad": 0, "fair": 1, "good": 2},
    },
    "gpt2, two classes": {**CASES["gpt2"], "architectures": ["GPT2ForSequenceClassification"]},
}


def file_name(case: str) -> str:
    return case.replace(", ", "-").replace(" ", "_")
