"""Reduce a configuration to a size that compiles in a second: the same structure and options, with small numbers.

Nothing is dropped: the pattern of windows, the ratio of query to key-value heads, tying, caps, adapters, the terms of
the objective. Terms with weight 0 in the configuration are enabled, and all get a large enough weight: an error in
a term scaled by 1e-4 would be lost in the rounding of the others.
"""

import math

from maxlm.checkpoint.folder import find_checkpoint, read_metadata, trained_as
from maxlm.config.execution import DEFAULT_EXECUTION, ExecutionConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.model import ModelConfig
from maxlm.config.moe import MoeConfig
from maxlm.config.train import TrainConfig
from maxlm.core.sharding import MESH_AXES
from maxlm.errors import CheckpointError

# Rows and tokens of a batch: rows for eight devices or four microbatches, tokens for more than one attention block.
NUM_ROWS = 8
ROW_LENGTH = 96
# Devices that all meshes fit on: three axes of size two.
NUM_DEVICES = 8

_AUXILIARY_WEIGHT = 0.1


def full_model(config: TrainConfig) -> tuple[ModelConfig, ExecutionConfig, str]:
    """The model that a configuration trains, how it is computed, and the source of its shape.

    The default shape replaces that of a checkpoint that does not exist yet.
    """
    if config.model is not None:
        return config.model, config.execution or DEFAULT_EXECUTION, "its own"
    try:
        checkpoint = find_checkpoint(config.init_from)
    except CheckpointError:
        origin = f"the default one, because {config.init_from} does not exist yet"
        return ModelConfig(), config.execution or DEFAULT_EXECUTION, origin
    model, execution, _ = trained_as(read_metadata(checkpoint), where=checkpoint)
    return model, config.execution or execution, f"that of {config.init_from}"


def own_mesh(config: TrainConfig) -> MeshConfig:
    """The mesh of a configuration, with its free axis set to the remaining devices here."""
    mesh = config.mesh
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    left = NUM_DEVICES // (mesh.slices * math.prod(size for size in sizes.values() if size != -1))
    # All devices on the free axis is no specific request: then it is one device.
    left = max(left, 1) if mesh != MeshConfig() else 1
    return mesh.model_copy(update={axis: left for axis, size in sizes.items() if size == -1})


def reduced_model(
    model: ModelConfig, *, vocab_size: int, repeats: int = 1, mesh: MeshConfig | None = None
) -> ModelConfig:
    """The same structure with small numbers; it fits two devices per axis, and `mesh`, if `model` does.

    Args:
      repeats: groups of layers per pipeline stage.
    """
    mesh = mesh or MeshConfig(fsdp=1)
    pattern = len(model.window_pattern)
    turns = model.num_layers // pattern
    # Periods of the window pattern that two stages can share, once and twice each, if those of the model can.
    kept = math.gcd(turns, math.lcm(4, 2 * repeats, mesh.stage * repeats))
    if kept == 1 and turns % 3 == 0:
        kept = 3
    num_kv_heads = math.gcd(model.num_kv_heads, math.lcm(2, mesh.tensor))
    changes = {
        "vocab_size": vocab_size,
        "num_layers": pattern * kept,
        "embed_dim": math.lcm(16, mesh.fsdp * mesh.expert * mesh.context),
        "mlp_dim": math.lcm(24, mesh.tensor),
        "num_heads": num_kv_heads * (model.num_heads // model.num_kv_heads),
        "num_kv_heads": num_kv_heads,
        "head_dim": 8,
        "window_pattern": tuple(_small_window(window, model.window_pattern) for window in model.window_pattern),
        "moe": model.moe and _reduced_experts(model.moe, mesh),
    }
    return ModelConfig(**(model.model_dump() | changes))


def reduced_execution(execution: ExecutionConfig) -> ExecutionConfig:
    """The same options in float32: rounding to fewer bits turns the last bit of a sum into a step, and hides
    differences."""
    changes = {
        "max_length": 2 * ROW_LENGTH,
        "activation_dtype": "float32",
        "matmul_dtype": "float32",
        "gradient_sum_dtype": "float32",
        "parameter_dtype": "float32",
        "eight_bit": None,
        "loss_chunk_length": 48,
        "pipeline": execution.pipeline.model_copy(update={"microbatches": None}),
    }
    return execution.model_copy(update=changes)


def _reduced_experts(moe: MoeConfig, mesh: MeshConfig) -> MoeConfig:
    """Fewer and smaller experts, the same number per token; balancing enabled."""
    num_experts = min(moe.num_experts, math.lcm(max(4, 2 * moe.experts_per_token), mesh.expert))
    weight = max(moe.balance.loss_weight, _AUXILIARY_WEIGHT)
    changes = {
        "num_experts": num_experts,
        "mlp_dim": math.lcm(12, mesh.tensor),
        "balance": moe.balance.model_copy(update={"loss_weight": weight}),
        "router_z_loss": max(moe.router_z_loss, _AUXILIARY_WEIGHT),
    }
    return moe.model_copy(update=changes)


def reduced_config(config: TrainConfig, *, vocab_size: int) -> TrainConfig:
    """The configuration of the small model, with every term of its objective enabled."""
    lora = config.lora and config.lora.model_copy(update={"rank": 2, "alpha": 2 * config.lora.alpha / config.lora.rank})
    model, execution, _ = full_model(config)
    repeats = execution.pipeline.repeats
    return config.model_copy(
        update={
            "model": reduced_model(model, vocab_size=vocab_size, repeats=repeats, mesh=own_mesh(config)),
            "execution": reduced_execution(execution),
            "objective": config.objective.for_verification(),
            "lora": lora,
            "batch_size": NUM_ROWS,
            "accumulate": 1,
            "row_length": ROW_LENGTH,
        }
    )


def _small_window(window: int | None, pattern: tuple[int | None, ...]) -> int | None:
    """Windows of a few tokens, in the same order of size as in the pattern."""
    if window is None:
        return None
    rank = sorted({other for other in pattern if other is not None}).index(window)
    return 5 + 6 * rank if window > 5 else window


def describe_subject(config: TrainConfig, full: TrainConfig, origin: str) -> str:
    """What was verified, in a sentence: `config`, which is `full` reduced."""
    model, eight_bit = config.model, full.execution.eight_bit
    left_off = f", without the 8-bit rounding of execution.eight_bit={eight_bit}" if eight_bit else ""
    heads = f"{model.num_heads} heads on {model.num_kv_heads} key-value heads"
    return (
        f"{config.objective.kind}{', adapters' if config.lora else ''}; the model is {origin}, at {model.num_layers}"
        f" layers, width {model.embed_dim}, {heads}; {NUM_ROWS} rows of {ROW_LENGTH} tokens, float32{left_off}"
    )
