"""How large a published model is: parameters, memory for serving and training, and the meshes that it fits on."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config.load import parse_config
from maxlm.config.optim import OptimConfig
from maxlm.config.preset import PresetConfig
from maxlm.core.parameters import Parameter, abstract
from maxlm.core.sharding import MESH_AXES
from maxlm.core.tree import flatten
from maxlm.errors import ConfigError
from maxlm.models.decoder import Decoder
from maxlm.optim.build import make_optimizer
from maxlm.train.layout import check_layout
from maxlm.train.state import create_state
from maxlm.train.trained_model import num_active_parameters

# Memory of one device in bytes, from the vendors' data sheets.
DEVICES = {"TPU v5e": 16e9, "TPU v6e": 32e9, "H100": 80e9, "TPU v5p": 95e9, "H200": 141e9}
OPTIMIZERS = ("adamw", "adam8bit", "adafactor", "lion", "muon", "sgd")
# Tokens of the one row on each device, for training.
ROW_LENGTH = 4096
# What is left free: for the compiler's buffers, and because the rest is an estimate.
_SHARE_USED = 0.85
_MOST_DEVICES = 1024


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model; memory in bytes.

    active_parameters: those that process one token.
    bfloat16, int8: of the weights for serving; cache: of one text of `max_length` tokens, in bfloat16.
    training: of weights, gradients and optimizer state in float32, by optimizer.
    """

    title: str
    parameters: int
    active_parameters: int
    max_length: int
    bfloat16: float
    int8: float
    cache: float
    training: dict[str, float]


def model_size(preset: PresetConfig) -> ModelSize:
    """The sizes of a model; nothing is allocated."""
    declared = Decoder(preset.model, preset.execution)
    parameters = list(flatten(declared).values())
    length = preset.execution.max_length
    cache = jax.eval_shape(lambda: declared.create_caches(1, length, jnp.bfloat16))
    return ModelSize(
        title=preset.about.title,
        parameters=sum(math.prod(each.shape) for each in parameters),
        active_parameters=int(num_active_parameters([declared])),
        max_length=length,
        bfloat16=2.0 * sum(math.prod(each.shape) for each in parameters),
        int8=sum(map(_int8_bytes, parameters)),
        cache=_bytes(cache),
        training={kind: _training_bytes(declared, kind) for kind in OPTIMIZERS},
    )


def _int8_bytes(parameter: Parameter) -> float:
    """Of a parameter in an int8 bundle: a float32 scale for each output of a matrix, the rest in float32."""
    size = math.prod(parameter.shape)
    if parameter.role not in ("matrix", "table"):
        return 4.0 * size
    inputs = parameter.shape[-2 if parameter.role == "matrix" else -1]
    return size + 4.0 * size / inputs


def _training_bytes(declared: Decoder, kind: str) -> float:
    optimizer = make_optimizer(OptimConfig.model_validate({"kind": kind}), declared)
    weights = abstract(declared)
    return _bytes(jax.eval_shape(lambda weights: create_state(weights, optimizer), weights)) + _bytes(weights)


def _bytes(tree: Any) -> float:
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


@dataclass(frozen=True)
class Fit:
    """The smallest mesh on which a model can be trained. device_bytes: used on each device, estimated."""

    device: str
    mesh: dict[str, int]
    device_bytes: float


def fitting_meshes(preset: PresetConfig, size: ModelSize, optimizer: str = "adamw") -> Iterator[Fit]:
    """The smallest mesh of each kind of device, with layers recomputed in the backward pass."""
    length = min(ROW_LENGTH, size.max_length)
    for device, memory in DEVICES.items():
        for mesh in _meshes():
            used = size.training[optimizer] / math.prod(mesh.values()) + _working_bytes(preset, length, mesh["tensor"])
            if used <= _SHARE_USED * memory and _divides(preset, mesh, length):
                yield Fit(device, {axis: count for axis, count in mesh.items() if count > 1}, used)
                break


def _meshes() -> Iterator[dict[str, int]]:
    """Fully sharded data parallelism over as few devices as possible, with as little tensor parallelism."""
    for exponent in range(int(math.log2(_MOST_DEVICES)) + 1):
        for tensor in (1, 2, 4, 8):
            if (fsdp := 2**exponent // tensor) >= 1:
                yield {"fsdp": fsdp, "tensor": tensor}


def _working_bytes(preset: PresetConfig, length: int, tensor: int) -> float:
    """Of one row on a device: the stream before each layer, one layer's weights and values, a part of the logits."""
    model = preset.model
    layers = flatten(Decoder(model, preset.execution).layers).values()
    largest = max(math.prod(each.shape[each.num_stacked :]) for each in layers)
    per_layer = sum(math.prod(each.shape) for each in layers) / model.num_layers
    stream = 2.0 * length * model.embed_dim / tensor
    # Gathered in bfloat16, for this layer and the next; gradients of one layer in float32 before they are sharded.
    weights = (2 * 2 + 4) * max(largest, per_layer) / tensor
    logits = 3 * 4.0 * min(length, preset.execution.loss_chunk_length) * model.vocab_size / tensor
    return (model.num_layers + 16) * stream + weights + logits


def _divides(preset: PresetConfig, mesh: dict[str, int], length: int) -> bool:
    tree = {
        "kind": "train",
        "output": "run",
        "model": preset.model.model_dump(mode="json"),
        "execution": preset.execution.model_dump(mode="json"),
        "objective": {"kind": "pretrain", "sources": [{"path": "data"}]},
        "row_length": length,
        "batch_size": math.prod(mesh.values()),
        "mesh": mesh,
    }
    try:
        check_layout(parse_config(tree), dict.fromkeys(MESH_AXES, 1) | mesh)
    except ConfigError:
        return False
    return True
