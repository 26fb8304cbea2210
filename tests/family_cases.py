"""Tiny models of each family: their config.json, as `transformers` or published checkpoints write it.

`tools/family_goldens.py` computes their logits, loss, gradient and greedy text with `transformers`.
"""

from typing import Any

Settings = dict[str, Any]


def without(settings: Settings, *keys: str) -> Settings:
    return {key: value for key, value in settings.items() if key not in keys}


TOKENS: Settings = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
THREE_LAYERS = LLAMA | {"num_hidden_layers": 3}
WIDE_HEADS = LLAMA | {"head_dim": 16}
WINDOW = 6
DENSE = LLAMA | {"model_type": "llama"}
MISTRAL = LLAMA | {"model_type": "mistral"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN2_MOE = LLAMA | EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 28}
GEMMA2 = WIDE_HEADS | {"model_type": "gemma2", "sliding_window": WINDOW}
GEMMA3 = WIDE_HEADS | {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
DEEPSEEK = LLAMA | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
}
DEEPSEEK_2 = DEEPSEEK | {"model_type": "deepseek_v2"}
DEEPSEEK_3 = DEEPSEEK | {"model_type": "deepseek_v3"}
OLMO2 = LLAMA | {"model_type": "olmo2"}
GPT_OSS = LLAMA | {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
SMOLLM3 = THREE_LAYERS | {"model_type": "smollm3"}
PHI3 = LLAMA | {"model_type": "phi3"}
STABLELM = without(LLAMA, "rms_norm_eps") | {"model_type": "stablelm", "partial_rotary_factor": 0.25}
NEOX = TOKENS | {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
BLOOM = TOKENS | {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
FALCON = TOKENS | {
    "model_type": "falcon",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "alibi": False,
}
FALCON_SEQUENTIAL = FALCON | {"multi_query": False, "parallel_attn": False, "bias": True}
FALCON_GROUPS = FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

GLM4_MOE = LLAMA | {
    "model_type": "glm4_moe",
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
}
CASES: dict[str, Settings] = {
    "llama": DENSE,
    "llama, old keys, tied, one layer": DENSE
    | {
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "llama 3, biases, wide heads": DENSE
    | {"head_dim": 16, "attention_bias": True, "rope_theta": 5000.0, "rope_scaling": LLAMA3_SCALING},
    "llama, yarn": DENSE
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        },
    },
    "llama, as many key heads": without(DENSE, "num_key_value_heads"),
    "llama, dynamic": DENSE | {"max_position_embeddings": 8, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama, longrope": DENSE
    | {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": 8,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    },
    "mistral": MISTRAL | {"sliding_window": WINDOW},
    "mistral, window longer than the text": MISTRAL | {"sliding_window": 4096},
    "mixtral": LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, windows": THREE_LAYERS
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen2_moe": QWEN2_MOE | {"mlp_only_layers": [0]},
    "qwen2_moe, no biases, every other layer": QWEN2_MOE
    | {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 12,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": WIDE_HEADS | {"model_type": "qwen3"},
    "qwen3_moe": WIDE_HEADS | EXPERTS | {"model_type": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": [1]},
    "gemma": WIDE_HEADS | {"model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": GEMMA2 | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3_text": GEMMA3
    | {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_text, all layers global": GEMMA3 | {"layer_types": ["full_attention"] * 2},
    "gemma3_text, scaled positions in windows": GEMMA3
    | {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        },
    },
    "deepseek_v2": DEEPSEEK_2
    | {
        "num_hidden_layers": 1,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "deepseek_v2, lite": DEEPSEEK_2
    | {
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "deepseek_v3": DEEPSEEK_3 | {"first_k_dense_replace": 1, "norm_topk_prob": True},
    "deepseek_v3, biases, scaled positions": DEEPSEEK_3
    | {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "attention_bias": True,
        "num_nextn_predict_layers": 1,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
        },
    },
    "deepseek_v3, no experts": DEEPSEEK_3 | {"first_k_dense_replace": 2},
    "glm4_moe": GLM4_MOE,
    "glm4_moe, norms and biases, groups": GLM4_MOE
    | {
        "use_qk_norm": True,
        "attention_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 1,
        "partial_rotary_factor": 0.25,
        "head_dim": 16,
        "num_nextn_predict_layers": 0,
    },
    "olmo2": OLMO2,
    "olmo2, biases, tied": OLMO2 | {"attention_bias": True, "tie_word_embeddings": True, "rope_theta": 5000.0},
    "olmo3": LLAMA
    | {
        "model_type": "olmo3",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "rope_theta": 500000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 1.2,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
    "gpt_oss": GPT_OSS
    | {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "swiglu_limit": 0.7,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    "gpt_oss, settings left out": GPT_OSS
    | {
        "num_hidden_layers": 1,
        "attention_bias": False,
        "num_local_experts": 3,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
    },
    "glm": WIDE_HEADS | {"model_type": "glm", "attention_bias": True},
    "glm4": WIDE_HEADS | {"model_type": "glm4"},
    "smollm3": SMOLLM3 | {"no_rope_layer_interval": 2},
    "smollm3, no positions": SMOLLM3 | {"no_rope_layers": [0, 0, 0]},
    "smollm3, windows, biases": SMOLLM3
    | {
        "no_rope_layers": [0, 1, 1],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_window_layers": 28,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": 5000.0,
    },
    "phi3": PHI3 | {"sliding_window": WINDOW},
    "phi3, longrope, short text": PHI3
    | {
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0]},
    },
    "phi3, settings of Phi-4 mini, wide heads": PHI3
    | {
        "head_dim": 16,
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
    },
    "stablelm": STABLELM,
    "stablelm, parallel": STABLELM
    | {"partial_rotary_factor": 0.5, "use_parallel_residual": True, "use_qkv_bias": True},
    "gpt2": TOKENS | {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": NEOX | {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "gpt_neox, sequential": NEOX | {"use_parallel_residual": False, "attention_bias": False},
    "bloom": BLOOM,
    "bloom, residual of norms": BLOOM
    | {"n_layer": 1, "apply_residual_connection_post_layernorm": True, "tie_word_embeddings": False},
    "falcon": FALCON | {"bias": False},
    "falcon, alibi": without(FALCON_SEQUENTIAL, "max_position_embeddings")
    | {"alibi": True, "apply_residual_connection_post_layernorm": False},
    "falcon, groups of heads, two norms": FALCON_GROUPS,
    "falcon, sequential, own key heads": FALCON_SEQUENTIAL,
    "falcon, groups of heads, one norm": FALCON_GROUPS | {"num_ln_in_parallel_attn": 1, "bias": True},
}

# Reward models and classifiers: computed by the classes ...ForSequenceClassification.
SCORE_CASES: dict[str, Settings] = {
    "llama, reward": DENSE
    | {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
    },
    "qwen2, three classes": CASES["qwen2"]
    | {
        "architectures": ["Qwen2ForSequenceClassification"],
        "id2label": {"0": "bad", "1": "fair", "2": "good"},
        "label2id": {"bad": 0, "fair": 1, "good": 2},
    },
    "gpt2, two classes": CASES["gpt2"] | {"architectures": ["GPT2ForSequenceClassification"]},
}

# The kind of tokenizer that published models have, as tests/tokenizer_kinds.py makes small ones. Where tokenizer.json
# is named, transformers 5 gives other ids without it: it puts no space before the text.
_SENTENCEPIECE, _SENTENCEPIECE_JSON = "SentencePiece BPE", "SentencePiece BPE, tokenizer.json"
_BYTES, _BYTES_WITH_BOS = "byte-level BPE", "byte-level BPE with bos"
TOKENIZERS: dict[str, str] = {
    "llama": _SENTENCEPIECE,
    "llama 3": _BYTES_WITH_BOS,
    "mistral": _SENTENCEPIECE_JSON,
    "mixtral": _SENTENCEPIECE_JSON,
    "qwen2": _BYTES,
    "qwen2_moe": _BYTES,
    "qwen3": _BYTES,
    "qwen3_moe": _BYTES,
    "gemma": _SENTENCEPIECE,
    "gemma2": _SENTENCEPIECE,
    "gemma3_text": _SENTENCEPIECE,
    "deepseek_v2": _BYTES_WITH_BOS,
    "deepseek_v3": _BYTES_WITH_BOS,
    "olmo2": _BYTES,
    "olmo3": _BYTES,
    "gpt_oss": _BYTES,
    "glm": _BYTES,
    "glm4": _BYTES,
    "glm4_moe": _BYTES,
    "smollm3": _BYTES_WITH_BOS,
    "phi3": _SENTENCEPIECE_JSON,
    "stablelm": _BYTES,
    "gpt2": _BYTES,
    "gpt_neox": _BYTES,
    "bloom": _BYTES,
    "falcon": _BYTES,
}


def tokenizer_kind(case: str) -> str:
    """The kind of tokenizer of a case: that of the generation which its name begins with, or of its family."""
    own = case.partition(",")[0]
    return TOKENIZERS[own] if own in TOKENIZERS else TOKENIZERS[(CASES | SCORE_CASES)[case]["model_type"]]


def file_name(case: str) -> str:
    return case.replace(", ", "-").replace(" ", "_")
