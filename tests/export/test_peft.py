"""Adapters of `peft`: imported, used, exported again, and refused where they do not fit; without peft itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from family_cases import CASES
from family_comparison import write_folder
from safetensors.numpy import load_file, save_file

import maxlm
from maxlm.cli import main
from maxlm.errors import CheckpointError
from maxlm.export.importing import import_huggingface
from maxlm.interop.huggingface import load_huggingface
from maxlm.interop.peft import read_peft

RANK, ALPHA, HIDDEN, KEYS, INNER = 3, 12, 32, 16, 40
SHAPES = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, KEYS), "down_proj": (INNER, HIDDEN)}
TOKENS = np.arange(24).reshape(2, 12)


def draw(seed: int, *shape: int) -> np.ndarray:
    return 0.2 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write_adapter(folder: Path, changes: dict | None = None, *, without: str = "") -> dict[str, np.ndarray]:
    """An adapter of some matrices of a Llama of two layers, as peft writes it; returns its tensors."""
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": list(SHAPES)}
    (folder / "adapter_config.json").write_text(json.dumps(settings | (changes or {})))
    tensors = {}
    for layer in range(2):
        for seed, (module, (inputs, outputs)) in enumerate(SHAPES.items()):
            part = "mlp" if module == "down_proj" else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{part}.{module}"
            tensors[f"{name}.lora_A.weight"] = draw(10 * layer + seed, RANK, inputs)
            tensors[f"{name}.lora_B.weight"] = draw(50 + 10 * layer + seed, outputs, RANK)
    tensors = {name: x for name, x in tensors.items() if not without or without not in name}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`hf`, a model of transformers; `base`, its run folder; `adapter`, of peft; `run`, their run folder."""
    folder = tmp_path_factory.mktemp("peft")
    (folder / "hf").mkdir()
    write_folder(folder / "hf", CASES["llama"])
    import_huggingface(folder / "hf", folder / "base")
    write_adapter(folder / "adapter")
    assert main(["import", "peft", str(folder / "adapter"), str(folder / "run"), "--base", str(folder / "base")]) == 0
    return folder


def test_imported_adapter_computes_what_the_equation_says(folder, tmp_path):
    """W + alpha / r * B A, in the folder of a model that transformers reads."""
    tensors, expected = load_file(folder / "adapter" / "adapter_model.safetensors"), {}
    for name, weight in load_file(folder / "hf" / "model.safetensors").items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected[name] = weight
        if f"{module}.lora_A.weight" in tensors:
            down, up = (tensors[f"{module}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
            expected[name] = (weight + ALPHA / RANK * up @ down).astype(np.float32)
    (tmp_path / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    save_file(expected, tmp_path / "model.safetensors", {"format": "pt"})
    found, base = maxlm.load(folder / "run").logits(TOKENS), maxlm.load(folder / "base").logits(TOKENS)
    np.testing.assert_allclose(found, maxlm.load(tmp_path).logits(TOKENS), atol=1e-4)
    assert np.abs(found - base).max() > 0.1


def test_export_returns_every_tensor(folder, tmp_path):
    for _ in range(2):
        # The second time, an earlier export is replaced.
        assert main(["export", str(folder / "run"), str(tmp_path / "out"), "--format", "peft"]) == 0
    given, written = (load_file(each / "adapter_model.safetensors") for each in (folder / "adapter", tmp_path / "out"))
    assert given.keys() == written.keys()
    for name, x in given.items():
        np.testing.assert_array_equal(written[name], x)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", RANK, ALPHA)


def test_adapter_of_some_layers_leaves_the_others(folder, tmp_path):
    write_adapter(tmp_path / "adapter", without="layers.0")
    model, _ = load_huggingface(folder / "hf")
    config, adapters = read_peft(tmp_path / "adapter", model)
    assert config.targets == ("layers/1/mixer/key", "layers/1/mixer/query", "layers/1/mlp/down")
    for adapter in adapters.values():
        assert not adapter["up"][0].any()
        assert adapter["up"][1].any()


@pytest.mark.parametrize(
    ("changes", "without", "message"),
    [
        (
            {"r": 4},
            "",
            "lora_A.weight has the shape [3, 40], but rank 4 and the model's 40 inputs and 32 outputs make it [4, 40]",
        ),
        (
            {"use_dora": True},
            "",
            "lora_B.weight, and adapter_config.json describes lora_A.weight, lora_B.weight, lora_m",
        ),
        ({}, "q_proj.lora_B", "self_attn.q_proj has lora_A.weight, and adapter_config.json describes lora_A.weight"),
        ({"use_qalora": True}, "", "use_qalora is True, which maxlm does not support"),
        ({"bias": "all"}, "", "bias is 'all'; maxlm reads adapters without trained biases"),
        ({"init_lora_weights": "pissa"}, "", "init_lora_weights is 'pissa', which changes the base too"),
        ({"peft_type": "VERA"}, "", "peft_type is 'VERA'; maxlm reads LORA, IA3, PREFIX_TUNING and PROMPT_TUN"),
        ({}, "layers", "has no tensors"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(folder, tmp_path, capsys, changes, without, message):
    write_adapter(tmp_path / "adapter", changes, without=without)
    arguments = ["import", "peft", str(tmp_path / "adapter"), str(tmp_path / "run"), "--base", str(folder / "base")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_adapter_of_another_model_is_refused(folder, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    write_folder(tmp_path / "hf", CASES["gpt2"])
    import_huggingface(tmp_path / "hf", tmp_path / "base")
    arguments = ["import", "peft", str(folder / "adapter"), str(tmp_path / "run"), "--base", str(tmp_path / "base")]
    assert main(arguments) == 2
    assert (
        "is not a matrix of the model's layers; give the model that the adapter was trained on"
        in capsys.readouterr().err
    )


def write_prefix(folder: Path, **changes) -> np.ndarray:
    """A prefix of three tokens for a Llama of two layers, as peft writes it; returns its keys and values."""
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "num_transformer_submodules": 1, "num_layers": 2}
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    array = draw(1, 3, 2 * 2 * KEYS)
    save_file({"prompt_embeddings": array}, folder / "adapter_model.safetensors", {"format": "pt"})
    return array


def test_prefix_is_imported_and_exported_and_takes_part_in_generation(folder, tmp_path):
    array = write_prefix(tmp_path / "adapter")
    run = str(tmp_path / "run")
    assert main(["import", "peft", str(tmp_path / "adapter"), run, "--base", str(folder / "base")]) == 0
    model, base = maxlm.load(run), maxlm.load(folder / "base")
    assert np.abs(model.logits(TOKENS) - base.logits(TOKENS)).max() > 0.01
    assert main(["export", run, str(tmp_path / "out"), "--format", "peft"]) == 0
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == {"prompt_embeddings"}
    np.testing.assert_allclose(written["prompt_embeddings"], array, atol=1e-6)


def test_weights_of_a_prefix_have_no_place_in_a_model_of_hugging_face(folder, tmp_path, capsys):
    write_prefix(tmp_path / "adapter")
    run = str(tmp_path / "run")
    assert main(["import", "peft", str(tmp_path / "adapter"), run, "--base", str(folder / "base")]) == 0
    assert main(["export", run, str(tmp_path / "out"), "--format", "hf"]) == 2
    error = capsys.readouterr().err
    assert "has virtual tokens, for which Hugging Face's format has no place; export the adapters of its run" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_virtual_tokens": 4},
            "has the tensors {'prompt_embeddings': [3, 64]}, but the configuration and the model",
        ),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2, which maxlm does not support"),
        (
            {"num_virtual_tokens": None},
            "num_virtual_tokens is None, and must be a number from 1 on; copy the file again",
        ),
    ],
)
def test_prefix_that_does_not_fit_is_refused(folder, tmp_path, capsys, changes, message):
    write_prefix(tmp_path / "adapter", **changes)
    arguments = ["import", "peft", str(tmp_path / "adapter"), str(tmp_path / "run"), "--base", str(folder / "base")]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "what"),
    [("gpt2", "learned positions"), ("mistral", "windows"), ("llama, dynamic", "rotary positions that")],
)
def test_prefix_for_positions_that_differ_from_those_of_peft_is_refused(family, what, tmp_path):
    write_folder(tmp_path, CASES[family])
    write_prefix(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=f"virtual tokens the first positions, so that with {what}"):
        read_peft(tmp_path / "adapter", load_huggingface(tmp_path)[0])


def test_base_and_format_belong_together(folder, tmp_path, capsys):
    assert main(["import", "peft", str(folder / "adapter"), str(tmp_path / "run")]) == 2
    assert "--base RUN names the model of adapters" in capsys.readouterr().err
    assert main(["export", str(folder / "base"), str(tmp_path / "out"), "--format", "peft"]) == 2
    assert "has trained a whole model, and no adapters" in capsys.readouterr().err


def write_prompt(folder: Path, **changes) -> np.ndarray:
    """A prompt of three tokens for a Llama, as peft writes it; returns its embeddings."""
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "num_transformer_submodules": 1}
    settings |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Answer:", "token_dim": HIDDEN}
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    array = draw(1, 3, HIDDEN)
    save_file({"prompt_embeddings": array}, folder / "adapter_model.safetensors", {"format": "pt"})
    return array


def test_prompt_is_imported_and_exported_and_takes_part_in_generation(folder, tmp_path):
    array = write_prompt(tmp_path / "adapter")
    run = str(tmp_path / "run")
    assert main(["import", "peft", str(tmp_path / "adapter"), run, "--base", str(folder / "base")]) == 0
    model, base = maxlm.load(run), maxlm.load(folder / "base")
    assert np.abs(model.logits(TOKENS) - base.logits(TOKENS)).max() > 0.01
    assert main(["export", run, str(tmp_path / "out"), "--format", "peft"]) == 0
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"], array)


def test_prompt_that_does_not_fit_is_refused(folder, tmp_path, capsys):
    write_prompt(tmp_path / "adapter", num_virtual_tokens=4)
    arguments = ["import", "peft", str(tmp_path / "adapter"), str(tmp_path / "run"), "--base", str(folder / "base")]
    assert main(arguments) == 2
    assert "has the tensors {'prompt_embeddings': [3, 32]}, but the configuration" in capsys.readouterr().err
    write_folder(tmp_path, CASES["mistral"])
    with pytest.raises(CheckpointError, match="causal attention to all earlier tokens, and the model has windows"):
        read_peft(tmp_path / "adapter", load_huggingface(tmp_path)[0])
