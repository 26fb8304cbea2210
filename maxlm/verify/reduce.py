"""A configuration at a size that compiles in a second: its own structure and options, with small numbers.

Nothing is dropped: the pattern of windows, the ratio of query to key-value heads, tying, caps, adapters, the terms of
the objective. Terms that a configuration leaves at weight 0 are turned on, and all get a weight that shows: an error in
a term that is scaled by 1e-4 would hide in the rounding of the others.
"""

from maxlm.config.model import ModelConfig
from maxlm.config.moe import MoeConfig
from maxlm.config.train import TrainConfig
from maxlm.errors import CheckpointError
from maxlm.train.checkpoint import find_checkpoint, read_metadata

# Rows and tokens of a batch: rows for eight devices or four microbatches, tokens for more than one block of attention.
NUM_ROWS = 8
ROW_LENGTH = 96

_MOST_LAYERS = 8
_AUXILIARY_WEIGHT = 0.1
_AUXILIARY_FIELDS = ("z_loss", "center", "sft_weight", "kl_beta")


def full_model(config: TrainConfig) -> tuple[ModelConfig, str]:
    """The model that a configuration trains, and where its shape was found.

    The default shape stands for that of a checkpoint which does not exist yet.
    """
    if config.model is not None:
        return config.model, "its own"
    try:
        metadata = read_metadata(find_checkpoint(config.init_from))
    except CheckpointError:
        return ModelConfig(), f"the default one, because {config.init_from} is not there yet"
    return ModelConfig(**metadata["config"]["model"]), f"that of {config.init_from}"


def reduced_model(model: ModelConfig, *, vocab_size: int) -> ModelConfig:
    """The same structure with small numbers, in float32."""
    pattern = len(model.window_pattern)
    turns = model.num_layers // pattern
    # Two or four turns of the window pattern, where the model has them, so that two stages get some each.
    wanted = max(1, min(4, _MOST_LAYERS // pattern))
    num_kv_heads = 2 if model.num_kv_heads % 2 == 0 else 1
    changes = {
        "vocab_size": vocab_size,
        "num_layers": pattern * max(count for count in (1, 2, 3, 4) if count <= wanted and turns % count == 0),
        "embed_dim": 16,
        "mlp_dim": 24,
        "num_heads": num_kv_heads * (model.num_heads // model.num_kv_heads),
        "num_kv_heads": num_kv_heads,
        "head_dim": 8,
        "max_length": 2 * ROW_LENGTH,
        "window_pattern": tuple(_small_window(window, model.window_pattern) for window in model.window_pattern),
        # Rounding to fewer bits turns the last bit of a sum into a step, and hides what is looked for.
        "activation_dtype": "float32",
        "matmul_dtype": "float32",
        "parameter_dtype": "float32",
        "eight_bit": None,
        "loss_chunk_length": 48,
        "moe": model.moe and _reduced_experts(model.moe),
        "pipeline": model.pipeline.model_copy(update={"microbatches": None}),
    }
    return ModelConfig(**(model.model_dump() | changes))


def _reduced_experts(moe: MoeConfig) -> MoeConfig:
    """Fewer and smaller experts, as many of them for a token; what balances them on."""
    num_experts = min(moe.num_experts, max(4, 2 * moe.experts_per_token))
    weight = max(moe.balance.loss_weight, _AUXILIARY_WEIGHT)
    changes = {
        "num_experts": num_experts,
        "mlp_dim": 12,
        "balance": moe.balance.model_copy(update={"loss_weight": weight}),
        "router_z_loss": max(moe.router_z_loss, _AUXILIARY_WEIGHT),
        # Which tokens a full expert drops depends on the layout: here none is ever full.
        "capacity_factor": float(num_experts),
    }
    return moe.model_copy(update=changes)


def reduced_config(config: TrainConfig, *, vocab_size: int) -> TrainConfig:
    """The configuration of the small model, every term of its objective on."""
    objective = config.objective
    weights = {
        name: max(getattr(objective, name), _AUXILIARY_WEIGHT) for name in _AUXILIARY_FIELDS if hasattr(objective, name)
    }
    if objective.kind == "distill":
        weights = {"alpha": min(max(objective.alpha, _AUXILIARY_WEIGHT), 1 - _AUXILIARY_WEIGHT)}
    if objective.kind == "grpo":
        weights |= {"group_size": 2, "max_new_tokens": 8, "updates_per_rollout": 1}
    lora = config.lora and config.lora.model_copy(update={"rank": 2, "alpha": 2 * config.lora.alpha / config.lora.rank})
    return config.model_copy(
        update={
            "model": reduced_model(full_model(config)[0], vocab_size=vocab_size),
            "objective": objective.model_copy(update=weights),
            "lora": lora,
            "batch_size": NUM_ROWS,
            "accumulate": 1,
            "row_length": ROW_LENGTH,
        }
    )


def _small_window(window: int | None, pattern: tuple[int | None, ...]) -> int | None:
    """Windows of a few tokens, in the order of size that they have in the pattern."""
    if window is None:
        return None
    rank = sorted({other for other in pattern if other is not None}).index(window)
    return 5 + 6 * rank if window > 5 else window


def describe(config: TrainConfig, origin: str) -> str:
    """What was verified, in a sentence."""
    model = config.model
    heads = f"{model.num_heads} heads on {model.num_kv_heads} key-value heads"
    return (
        f"{config.objective.kind}{', adapters' if config.lora else ''}; the model is {origin}, at {model.num_layers}"
        f" layers, width {model.embed_dim}, {heads}; {NUM_ROWS} rows of {ROW_LENGTH} tokens, float32"
    )
