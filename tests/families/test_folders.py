"""Folders of Hugging Face models that are unusual or broken: all is kept, or refused in one sentence."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from family_cases import CASES
from family_comparison import write_folder
from safetensors.numpy import load_file, save_file

from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError
from maxlm.interop import tensor_files
from maxlm.interop.huggingface import load_huggingface, read_description, write_huggingface

LLAMA = CASES["llama"]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder, LLAMA)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "llama"))


def write_settings(folder: Path, settings: dict) -> None:
    """Write config.json, without settings that are ... ."""
    kept = {key: value for key, value in settings.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def change_settings(folder: Path, **changes) -> None:
    """Change settings of config.json; a setting that becomes ... is removed."""
    write_settings(folder, json.loads((folder / "config.json").read_text()) | changes)


def describe(folder: Path, settings: dict) -> tuple:
    write_settings(folder, settings)
    return read_description(folder)


def change_tensors(folder: Path, **changes) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / "model.safetensors")


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        load_huggingface(folder)
    message = str(refusal.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, ["model_type", "'mamba'", "llama"]),
        ({"model_type": ...}, ["names no model_type"]),
        ({"hidden_act": "quick_gelu"}, ["hidden_act", "'quick_gelu'", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias", "True", "must be False"]),
        ({"rope_scaling": {"type": "stretched", "factor": 2.0}}, ["rope_scaling", "'stretched'", "llama3"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, ["rope_scaling", "alpha", "3"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "factor is missing"]),
        ({"rope_scaling": "linear"}, ["rope_scaling", "group of settings"]),
        ({"attention_sinks": 4}, ["attention_sinks (4)", "remove it from the file"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"vocab_size": ...}, ["vocab_size is missing"]),
        ({"vocab_size": "many"}, ["vocab_size is 'many'"]),
        ({"num_key_value_heads": 3}, ["num_heads (4) must be a multiple of num_kv_heads (3)"]),
        ({"rms_norm_eps": 0}, ["epsilon", "greater than 0"]),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ["layer_types has 1", "num_hidden_layers 2"]),
        ({"hidden_size": 16}, ["has the shape", "describes"]),
        ({"num_hidden_layers": 3}, ["model.layers.2", "is missing", "more are"]),
        ({"num_hidden_layers": 1}, ["model.layers.1", "is not part of the model"]),
        ({"attention_bias": True}, ["model.layers.0.self_attn.q_proj.bias is missing"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight differs from model.embed_tokens.weight"]),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(folder, changes, words):
    change_settings(folder, **changes)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("llama", {"rope_theta": "x"}, ["rope_theta is 'x'", "must be a number"]),
        ("llama, longrope", {"max_position_embeddings": [8]}, ["max_position_embeddings is [8]"]),
        (
            "llama, yarn",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            ["rope_parameters and rope_scaling differ"],
        ),
        ("olmo3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["type is 'linear'", "call it rope_type"]),
        ("olmo3", {"layer_types": 5}, ["layer_types is 5", "must be a list"]),
        ("olmo3", {"rope_scaling": None, "rope_parameters": {"rope_theta": 1e5}}, ["rope_parameters", "rope_theta"]),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping is 50.0", "must be None"]),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar is 0", "above 0"]),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, ["sliding_attention", "without a sliding_window"]),
        ("qwen2_moe", {"mlp_only_layers": 1}, ["mlp_only_layers is 1", "must be a list"]),
        ("deepseek_v3", {"first_k_dense_replace": -1}, ["first_k_dense_replace is -1", "must be a whole number"]),
        ("deepseek_v3", {"num_key_value_heads": 2}, ["num_key_value_heads is 2", "must be 4"]),
        ("gpt_neox", {"rope_theta": 500.0}, ["rope_theta is 500.0", "must be 10000.0"]),
        ("falcon, alibi", {"num_kv_heads": 2}, ["num_kv_heads is 2", "must be 4"]),
        ("falcon, alibi", {"num_attention_heads": 64}, ["must be a multiple of num_attention_heads, 64"]),
    ],
    ids=str,
)
def test_settings_that_would_be_overlooked_are_refused(case, changes, words, tmp_path):
    """What transformers computes otherwise, or not at all."""
    (tmp_path / "config.json").write_text(json.dumps(CASES[case] | changes))
    with pytest.raises(CheckpointError) as refusal:
        read_description(tmp_path)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gemma2", {"cache_implementation": "hybrid"}),
        ("deepseek_v2", {"ep_size": 1}),
        ("gpt_neox", {"rope_theta": 10000, "partial_rotary_factor": 0.25}),
        ("llama, yarn", {"rope_scaling": CASES["llama, yarn"]["rope_parameters"]}),
    ],
)
def test_settings_that_repeat_others_change_nothing(case, changes, tmp_path):
    assert describe(tmp_path, CASES[case] | changes) == describe(tmp_path, CASES[case])


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("case", "default", "layers"),
    [
        ("gemma2", {}, {"layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING]}),
        ("gemma3_text", {"num_hidden_layers": 7}, {"layer_types": [SLIDING] * 5 + [FULL, SLIDING]}),
        ("olmo3", {}, {"layer_types": [SLIDING] * 3 + [FULL, SLIDING]}),
        ("gpt_oss", {}, {"layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING]}),
        ("smollm3", {"no_rope_layer_interval": ...}, {"no_rope_layers": [1, 1, 1, 0, 1]}),
    ],
)
def test_layers_that_are_not_listed_follow_the_pattern_of_the_family(case, default, layers, tmp_path):
    """What transformers 5.23 writes as the default of these settings."""
    settings = CASES[case] | {"layer_types": ..., "num_hidden_layers": 5} | default
    assert describe(tmp_path, settings) == describe(tmp_path, settings | layers)


def test_tensors_that_do_not_fit_are_refused(folder):
    change_tensors(folder, **{"model.norm.weight": None})
    refused(folder, "model.norm.weight is missing")
    change_tensors(folder, **{"model.norm.weight": np.ones(33, np.float32)})
    refused(folder, "model.norm.weight", "[33]", "[32]")
    change_tensors(folder, **{"model.norm.weight": np.ones(32, np.int8)})
    refused(folder, "model.norm.weight", "I8", "convert it")
    change_tensors(folder, **{"model.norm.weight": np.ones(32, np.float32), "model.extra": np.ones(3, np.float32)})
    refused(folder, "model.extra is not part of the model")


def test_broken_files_are_refused(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-7], whole[:100], whole[:3], b""):
        file.write_bytes(broken)
        refused(folder, "model.safetensors", "corrupt or truncated")
    file.unlink()
    refused(folder, "model.safetensors.index.json")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "part.safetensors"}}))
    refused(folder, "part.safetensors", "no such file")
    (folder / "part.safetensors").write_bytes(whole)
    index.write_text(json.dumps({"weight_map": {"model.nothing": "part.safetensors"}}))
    refused(folder, "model.nothing is not in part.safetensors")
    index.write_text("[]")
    refused(folder, "index.json", "corrupt")
    index.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "PyTorch files", "save_pretrained")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "corrupt")


def test_a_second_copy_of_a_tied_table_is_accepted(tmp_path):
    write_folder(tmp_path, LLAMA | {"tie_word_embeddings": True})
    plain = flatten(load_huggingface(tmp_path)[0])
    change_tensors(
        tmp_path, **{"lm_head.weight": load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]}
    )
    for path, array in flatten(load_huggingface(tmp_path)[0]).items():
        np.testing.assert_array_equal(array, plain[path])


def test_names_may_lack_their_first_part(tmp_path):
    """As in a file of the model without its output head, such as that of GPT-2."""
    tensors = write_folder(tmp_path, CASES["gpt2"])
    plain = flatten(load_huggingface(tmp_path)[0])
    short = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    save_file(short | {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}, tmp_path / "model.safetensors")
    for path, array in flatten(load_huggingface(tmp_path)[0]).items():
        np.testing.assert_array_equal(array, plain[path])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=lambda dtype: dtype.__name__)
def test_dtype_is_kept_and_files_are_split(dtype, original, tmp_path, monkeypatch):
    """Several files with an index, each device reading its own part: the same tensors."""
    monkeypatch.setattr(tensor_files, "MAX_FILE_BYTES", 12_000)
    tensors = {name: x.astype(dtype) for name, x in load_file(original / "model.safetensors").items()}
    shutil.copy(original / "config.json", tmp_path)
    tensor_files.write_tensors(tmp_path, tensors.items(), sum(x.nbytes for x in tensors.values()))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    mesh = make_mesh(MeshConfig(fsdp=8))
    model, _ = load_huggingface(tmp_path, mesh)
    assert model.layers[0][0].mixer.query.addressable_shards[0].data.size * 8 == model.layers[0][0].mixer.query.size
    assert model.layers[0][0].mixer.query.dtype == (dtype if dtype == ml_dtypes.bfloat16 else np.float32)
    out = tmp_path / "out"
    out.mkdir()
    write_huggingface(out, jax.device_get(model), None, {})
    written = {}
    for file in out.glob("*.safetensors"):
        assert file.stat().st_size < 15_000
        written |= load_file(file)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == dtype
        np.testing.assert_array_equal(written[name].view(np.uint8), np.ascontiguousarray(tensor).view(np.uint8))


def test_a_model_that_no_family_has_is_not_written(original, tmp_path):
    model, _ = load_huggingface(original)
    odd = model.config.model_copy(update={"logit_soft_cap": 3.0})
    model.config = odd
    with pytest.raises(CheckpointError, match="of no family"):
        write_huggingface(tmp_path, model, None, {})
    assert not any(tmp_path.iterdir())
