"""Adapters as Hugging Face's `peft` stores them: adapter_config.json and adapter_model.safetensors.

A module there is a tensor of the model's family here, without `.weight`: its table says which of our matrices it holds.
A module of several matrices, such as a fused query, key and value, has one low-rank update. Read, each of ours gets
the part of its outputs. Written, the ranks of ours are added up, since their first factors differ.

Dimensions: I inputs and O outputs of a module, R rank of its update.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from maxlm.config.adapters import AdaptersConfig, Ia3Config, LoraConfig, PrefixConfig, PromptTuningConfig
from maxlm.core.parameters import Parameter
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError
from maxlm.families.placement import Piece, Placed
from maxlm.interop.huggingface import find_family
from maxlm.interop.peft_prefix import read_prefix, written_prefix
from maxlm.interop.peft_prompt import read_prompt, written_prompt
from maxlm.models.adapters.apply import virtual_tokens
from maxlm.models.adapters.declare import create_adapters, declare_adapters
from maxlm.models.adapters.frozen import Adapters, is_adaptable
from maxlm.models.adapters.targets import names_of_layers
from maxlm.models.decoder import Decoder
from maxlm.runtime.manifest import write_json

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_IA3 = "ia3_l"
# Settings that do not change what a saved adapter computes; any other one must be off.
_WITHOUT_EFFECT = {
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
    ),
    *("runtime_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("lora_dropout", "loftq_config", "eva_config", "megatron_core", "qalora_group_size", "init_ia3_weights"),
    "ensure_weight_tying",
    # Of prefixes, whose MLP is folded into what is saved.
    *("token_dim", "num_attention_heads", "num_layers", "init_weights", "encoder_hidden_size", "prefix_projection"),
    # Of prompts, which are saved as they were trained.
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
}
_READ = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "feedforward_modules",
    "num_virtual_tokens",
}
# Other ways to begin change the base too.
_NEW = (None, True, False, "gaussian", "eva", "orthogonal")


def is_peft(path: Path) -> bool:
    """Whether a folder has an adapter_config.json."""
    return (path / CONFIG_FILE).is_file()


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module with an adapter: its tensor in the model, its arrays by name, and the factor of its low-rank update."""

    tensor: Placed
    arrays: dict[str, np.ndarray]
    scale: float


def read_peft(folder: Path, base: Decoder) -> tuple[AdaptersConfig, Adapters]:
    """The adapters of a folder for a model, and their configuration.

    Raises:
      CheckpointError: there are none, they are of another model, of a kind or with a setting that is not supported, or
        their tensors do not fit the configuration.
    """
    file = folder / CONFIG_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: there is no such file; give a folder as peft's save_pretrained writes it"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file}: is corrupt, or names no peft_type; copy the file again") from None
    if kind not in ("LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING"):
        raise CheckpointError(f"{file}: peft_type is {kind!r}; maxlm reads LORA, IA3, PREFIX_TUNING and PROMPT_TUNING")
    _check_settings(settings, file)
    tensors = _read_tensors(folder / TENSORS_FILE)
    config: AdaptersConfig
    if kind == "PREFIX_TUNING":
        config, values = read_prefix(settings, tensors, base, folder / TENSORS_FILE)
        return config, _filled(base, config, values)
    if kind == "PROMPT_TUNING":
        return read_prompt(settings, tensors, base, folder / TENSORS_FILE)
    modules = _read_modules(folder / TENSORS_FILE, tensors, settings, base)
    if kind == "IA3":
        config, values = _read_ia3(modules, settings, base)
    else:
        config, values = _read_lora(modules, settings, base)
    return config, _filled(base, config, values)


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    if settings.get("init_lora_weights") not in _NEW:
        raise CheckpointError(
            f"{file}: init_lora_weights is {settings['init_lora_weights']!r}, which changes the base too; convert the"
            " adapter with peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    known = _WITHOUT_EFFECT | _READ | {"init_lora_weights", "bias"}
    if settings.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias is {settings['bias']!r}; maxlm reads adapters without trained biases")
    for name, value in settings.items():
        if name == "num_transformer_submodules" and value == 1:
            continue
        if name not in known and value:
            raise CheckpointError(f"{file}: {name} is {value!r}, which maxlm does not support")


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file; copy the folder again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: is corrupt or truncated ({error}); copy the file again") from None


def _read_modules(
    file: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any], base: Decoder
) -> dict[str, _Module]:
    _, placed = find_family(base)
    declared = flatten(Decoder(base.config, base.execution))
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        module, part = _split_name(name)
        if part is None:
            raise CheckpointError(f"{file}: {name} is not a tensor of LoRA or IA3, which maxlm reads")
        tensor = placed.get(f"{module}.weight")
        if tensor is None or not all(is_adaptable(declared[piece.path]) for piece in tensor.pieces):
            raise CheckpointError(
                f"{file}: adapts {module}, which is not a matrix of the model's layers; give the model that the adapter"
                " was trained on"
            )
        arrays.setdefault(module, {})[part] = array.astype(np.float32)
    modules = {}
    for module, parts in arrays.items():
        rank, alpha = (
            _of_module(settings, pattern, module, settings.get(default, 8))
            for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        tensor = placed[f"{module}.weight"]
        _check_shapes(file, module, parts, tensor, rank, settings)
        modules[module] = _Module(tensor, parts, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))
    if not modules:
        raise CheckpointError(f"{file}: has no tensors; copy the file again")
    return modules


def _split_name(name: str) -> tuple[str, str | None]:
    """The module of a tensor, and what of its adapter it is; None: nothing that is read."""
    for part in (*_LORA, _IA3):
        if name.endswith(f".{part}"):
            return name.removeprefix(_PREFIX).removesuffix(f".{part}"), part
    return name, None


def _of_module(settings: dict[str, Any], pattern: str, module: str, default: Any) -> Any:
    """A setting of a module, which peft finds by the end of its name."""
    for name, value in (settings.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({name})$", module):
            return value
    return default


def _sides(tensor: Placed) -> tuple[int, int]:
    """Inputs and outputs of a module."""
    outputs, inputs = tensor.shape[::-1] if tensor.input_first else tensor.shape
    return inputs, outputs


def _check_shapes(
    file: Path, module: str, parts: dict[str, np.ndarray], tensor: Placed, rank: int, settings: dict[str, Any]
) -> None:
    inputs, outputs = _sides(tensor)
    if settings["peft_type"] == "IA3":
        expected: dict[str, tuple[tuple[int, ...], ...]] = {_IA3: ((outputs, 1), (1, inputs))}
    else:
        expected = {"lora_A.weight": ((rank, inputs),), "lora_B.weight": ((outputs, rank),)}
        if settings.get("use_dora"):
            expected["lora_magnitude_vector"] = ((outputs,),)
    if set(parts) != set(expected):
        raise CheckpointError(
            f"{file}: {module} has {', '.join(sorted(parts))}, and {CONFIG_FILE} describes"
            f" {', '.join(sorted(expected))}; copy both files from the same adapter"
        )
    for name, shapes in expected.items():
        if parts[name].shape not in shapes:
            raise CheckpointError(
                f"{file}: {module}.{name} has the shape {list(parts[name].shape)}, but rank {rank} and the model's"
                f" {inputs} inputs and {outputs} outputs make it {list(shapes[0])}; give the model and the"
                f" {CONFIG_FILE} of this adapter"
            )


# What a file says of adapters: by path, by name, by place in the stack.
_Values = dict[str, dict[str, dict[tuple[int, ...], np.ndarray]]]


def _read_lora(modules: dict[str, _Module], settings: dict[str, Any], base: Decoder) -> tuple[LoraConfig, _Values]:
    """Matrices share a rank, the largest, and a scale: smaller factors are padded with zeros, and other scales
    multiplied into the second factor."""
    first = next(iter(modules.values()))
    rank = max(module.arrays["lora_A.weight"].shape[0] for module in modules.values())
    is_stable = bool(settings.get("use_rslora"))
    values: _Values = {}
    for module in modules.values():
        down_RI, up_OR = module.arrays["lora_A.weight"], module.arrays["lora_B.weight"]
        padding = rank - down_RI.shape[0]
        factor = np.float32(module.scale / first.scale)
        for piece in module.tensor.pieces:
            of_piece = values.setdefault(piece.path, {"down": {}, "up": {}})
            of_piece["down"][piece.place] = np.pad(down_RI.T, ((0, 0), (0, padding)))
            of_piece["up"][piece.place] = np.pad(factor * up_OR[piece.rows].T, ((0, padding), (0, 0)))
            if "lora_magnitude_vector" in module.arrays:
                lengths = of_piece.setdefault("magnitude", {})
                lengths[piece.place] = module.arrays["lora_magnitude_vector"][piece.rows]
    config = LoraConfig(
        rank=rank,
        alpha=first.scale * (math.sqrt(rank) if is_stable else rank),
        scaling="rank_stabilized" if is_stable else "standard",
        decomposed=bool(settings.get("use_dora")),
        targets=_patterns(base, values),
    )
    return config, values


def _read_ia3(modules: dict[str, _Module], settings: dict[str, Any], base: Decoder) -> tuple[Ia3Config, _Values]:
    feedforward = settings.get("feedforward_modules") or []
    is_input = (
        (lambda module: re.fullmatch(feedforward, module) is not None)
        if isinstance(feedforward, str)
        else (lambda module: any(module == name or module.endswith(f".{name}") for name in feedforward))
    )
    outputs: _Values = {}
    inputs: _Values = {}
    for name, module in modules.items():
        for piece in module.tensor.pieces:
            factor = module.arrays[_IA3].ravel()
            if is_input(name):
                inputs.setdefault(piece.path, {"input_scale": {}})["input_scale"][piece.place] = factor
            else:
                of_piece = outputs.setdefault(piece.path, {"output_scale": {}})
                of_piece["output_scale"][piece.place] = factor[piece.rows]
    config = Ia3Config(outputs=_patterns(base, outputs), inputs=_patterns(base, inputs))
    return config, outputs | inputs


def _patterns(base: Decoder, values: _Values) -> tuple[str, ...]:
    """Targets that match these matrices and no others."""
    declared = {
        path: leaf for path, leaf in flatten(Decoder(base.config, base.execution)).items() if is_adaptable(leaf)
    }
    chosen: set[str] = set()
    others: set[str] = set()
    for path in declared:
        names = names_of_layers(base, path)
        places = next(iter(values[path].values())) if path in values else {}
        for place, name in np.ndenumerate(names):
            (chosen if place in places else others).add(str(name))
    leaf = lambda name: name.rsplit("/", 1)[-1]  # noqa: E731
    whole = {leaf(name) for name in chosen} - {leaf(name) for name in others}
    return (*sorted(whole), *sorted(name for name in chosen if leaf(name) not in whole))


def _filled(base: Decoder, config: AdaptersConfig, values: _Values) -> Adapters:
    """New adapters with the values of a file; what the file lacks stays as it is, which changes nothing."""
    plan = Decoder(base.config, base.execution)
    adapters = jax.device_get(create_adapters(plan, config, base, jax.random.key(0)))
    for path, by_name in values.items():
        for name, by_place in by_name.items():
            array = np.array(adapters[path][name])
            for place, value in by_place.items():
                array[place] = value
            adapters[path][name] = array
    return jax.tree.map(jnp.asarray, adapters)


def write_peft(folder: Path, base: Decoder, adapters: Adapters, config: AdaptersConfig) -> None:
    """Write adapters of a model.

    Raises:
      CheckpointError: peft has no such adapters, or no family has such models.
    """
    if not isinstance(config, LoraConfig | Ia3Config | PrefixConfig | PromptTuningConfig):
        raise CheckpointError(
            f"adapters.kind={config.kind}: peft has no format for it; export the model with merged weights: --format hf"
        )
    _, placed = find_family(base)
    declared = declare_adapters(Decoder(base.config, base.execution), config)
    held = {path: {name: np.asarray(x) for name, x in adapter.items()} for path, adapter in adapters.items()}
    settings: dict[str, Any] = {
        "base_model_name_or_path": None,
        "task_type": "CAUSAL_LM" if base.config.labels is None else "SEQ_CLS",
        "inference_mode": True,
    }
    tensors: dict[str, np.ndarray] = {}
    modules = [
        (tensor, [piece for piece in tensor.pieces if _is_held(piece, held, declared)]) for tensor in placed.values()
    ]
    modules = [(tensor, pieces) for tensor, pieces in modules if pieces]
    if isinstance(config, PrefixConfig):
        arrays = {path: np.asarray(x) for path, x in virtual_tokens(adapters).items()}
        of_prefix, tensors = written_prefix(base, arrays, folder)
        settings |= of_prefix
    elif isinstance(config, PromptTuningConfig):
        of_prompt, tensors = written_prompt(base, adapters, folder)
        settings |= of_prompt
    elif isinstance(config, LoraConfig):
        settings |= _written_lora(modules, held, base, config, tensors)
    else:
        settings |= _written_ia3(modules, held, tensors)
    whole = [tensor.name for tensor in placed.values() if "whole" in held.get(tensor.pieces[0].path, {})]
    for name in whole:
        tensors[f"{_PREFIX}{name}"] = held[placed[name].pieces[0].path]["whole"]
    settings["modules_to_save"] = [name.removesuffix(".weight") for name in whole] or None
    write_json(folder / CONFIG_FILE, settings)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / TENSORS_FILE, {"format": "pt"})


def _is_held(piece: Piece, held: Mapping[str, Any], declared: Adapters) -> bool:
    """Whether there is an adapter of this matrix of a layer."""
    if piece.path not in held or "whole" in held[piece.path]:
        return False
    parameter: Parameter = next(iter(declared[piece.path].values()))
    if parameter.trained is None:
        return True
    return parameter.trained[int(np.ravel_multi_index(piece.place, parameter.shape[: len(piece.place)]))]


_Modules = list[tuple[Placed, list[Piece]]]


def _module_of(tensor: Placed) -> str:
    return tensor.name.removesuffix(".weight")


def _written_lora(modules: _Modules, held, base: Decoder, config: LoraConfig, tensors) -> dict[str, Any]:
    ranks: dict[str, int] = {}
    for tensor, pieces in modules:
        name = _module_of(tensor)
        downs = [held[piece.path]["down"][piece.place].T for piece in pieces]
        ups = [held[piece.path]["up"][piece.place].T for piece in pieces]
        is_one = all(np.array_equal(each, downs[0]) for each in downs)
        down_RI = downs[0] if is_one else np.concatenate(downs)
        up_OR = np.zeros((_sides(tensor)[1], len(down_RI)), np.float32)
        for number, (piece, up) in enumerate(zip(pieces, ups)):
            first = 0 if is_one else number * config.rank
            up_OR[piece.rows, first : first + config.rank] = up
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = down_RI, up_OR
        if config.decomposed:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = _lengths(tensor, pieces, held, base)
        if len(down_RI) != config.rank:
            ranks[name] = len(down_RI)
    is_stable = config.scaling == "rank_stabilized"
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": _whole_number(config.alpha),
        "use_rslora": is_stable,
        "use_dora": config.decomposed,
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items()},
        # With these, the scale is the same.
        "alpha_pattern": {
            re.escape(name): _whole_number(config.scale * (math.sqrt(rank) if is_stable else rank))
            for name, rank in ranks.items()
        },
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [_module_of(tensor) for tensor, _ in modules],
        "fan_in_fan_out": any(tensor.input_first for tensor, _ in modules),
    }


def _whole_number(number: float) -> float:
    return int(number) if number == int(number) else number


def _lengths(tensor: Placed, pieces: list[Piece], held, base: Decoder) -> np.ndarray:
    """The magnitudes of a module; of matrices without an adapter, the length of their weights."""
    flat, lengths_O = flatten(base), np.empty(_sides(tensor)[1], np.float32)
    for piece in tensor.pieces:
        if piece in pieces:
            lengths_O[piece.rows] = held[piece.path]["magnitude"][piece.place]
        else:
            weight = np.asarray(flat[piece.path][piece.place], np.float32)
            lengths_O[piece.rows] = np.sqrt(np.sum(np.square(weight), axis=0))
    return lengths_O


def _written_ia3(modules: _Modules, held, tensors) -> dict[str, Any]:
    feedforward = []
    for tensor, pieces in modules:
        name, (inputs, outputs) = _module_of(tensor), _sides(tensor)
        adapters = [held[piece.path] for piece in pieces]
        if "input_scale" in adapters[0]:
            factors = [each["input_scale"][piece.place] for each, piece in zip(adapters, pieces)]
            if len(pieces) < len(tensor.pieces) or any(not np.array_equal(each, factors[0]) for each in factors):
                raise CheckpointError(
                    f"adapters.inputs: {name} is one matrix of several there, whose inputs have one factor in peft;"
                    " export the model with merged weights: --format hf"
                )
            feedforward.append(name)
            tensors[f"{_PREFIX}{name}.{_IA3}"] = factors[0].reshape(1, inputs)
            continue
        factor_O = np.ones(outputs, np.float32)
        for adapter, piece in zip(adapters, pieces):
            factor_O[piece.rows] = adapter["output_scale"][piece.place]
        tensors[f"{_PREFIX}{name}.{_IA3}"] = factor_O.reshape(outputs, 1)
    return {
        "peft_type": "IA3",
        "target_modules": [_module_of(tensor) for tensor, _ in modules],
        "feedforward_modules": feedforward,
        "fan_in_fan_out": any(tensor.input_first for tensor, _ in modules),
    }
