"""Configurations to verify; their files do not exist."""

from model_section import uniform

from maxlm.config.load import parse_config

SIZES = {"embed_dim": 256, "mlp_dim": 704, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
OBJECTIVES = {
    "pretrain": {"sources": [{"path": "nowhere"}]},
    "prefix_lm": {"sources": [{"path": "nowhere"}]},
    "multi_token": {"sources": [{"path": "nowhere"}]},
    "distill": {"teacher": "nowhere", "sources": [{"path": "nowhere"}], "temperature": 2.0},
    "sft": {"train_file": "nowhere.jsonl"},
    "reward": {"train_file": "nowhere.jsonl", "center": 0.01},
    "cost": {"train_file": "nowhere.jsonl"},
    "process_reward": {"train_file": "nowhere.jsonl"},
    "preference": {"train_file": "nowhere.jsonl"},
    "unpaired_preference": {"train_file": "nowhere.jsonl"},
    "distill_chat": {
        "teacher": "nowhere",
        "train_file": "nowhere.jsonl",
        "divergence": {"kind": "jensen_shannon", "temperature": 1.5},
    },
    "online_preference": {"train_file": "nowhere.jsonl"},
    "policy": {"train_file": "nowhere.jsonl"},
}


def small_model(**changes):
    """A `model:` section of two layers."""
    return uniform(**{**SIZES, **changes})


def config_of(kind, **settings):
    """A run of this objective."""
    tree = {
        "kind": "train",
        "output": "nowhere",
        "init_from": "nowhere",
        "model": small_model(),
        "execution": {},
        "objective": {"kind": kind, **OBJECTIVES[kind]},
        **settings,
    }
    return parse_config(tree)
