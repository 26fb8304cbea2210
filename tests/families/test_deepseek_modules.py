"""Prediction modules in files of DeepSeek-V3: read, written back bit for bit, or refused in one sentence."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from family_cases import CASES
from family_comparison import write_folder, write_folder_with_modules
from safetensors.numpy import load_file, save_file

from maxlm.cli import main
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError
from maxlm.export.export import export_model
from maxlm.export.importing import import_huggingface
from maxlm.interop.huggingface import load_huggingface, read_description
from maxlm.interop.load import load_any_model

CASE = CASES["deepseek_v3, biases, scaled positions"]
LAYERS, MODULES = CASE["num_hidden_layers"], 2


def write_modules(folder: Path, dtype=np.float32) -> dict[str, np.ndarray]:
    return write_folder_with_modules(folder, {**CASE, "num_nextn_predict_layers": MODULES}, dtype)


def change(folder: Path, **tensors) -> None:
    """Change tensors; one that becomes None is removed."""
    found = load_file(folder / "model.safetensors") | tensors
    save_file({name: x for name, x in found.items() if x is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
def test_modules_are_written_back_bit_for_bit(dtype, tmp_path):
    tensors = write_modules(tmp_path, dtype)
    imported = import_huggingface(tmp_path, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", format="hf")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, x in tensors.items():
        assert written[name].dtype == dtype
        np.testing.assert_array_equal(written[name].view(np.uint8), x.view(np.uint8), err_msg=name)
    assert read_description(tmp_path / "out") == read_description(tmp_path)
    model, _ = load_any_model(tmp_path / "run")
    assert len(model.multi_token) == MODULES
    copied = 2 * MODULES * tensors["lm_head.weight"].size
    assert imported.parameters == sum(x.size for x in tensors.values()) - copied


def test_each_tensor_is_where_it_belongs(tmp_path):
    tensors = write_modules(tmp_path)
    module = load_huggingface(tmp_path)[0].multi_token[1]
    name = f"model.layers.{LAYERS + 1}"
    np.testing.assert_array_equal(module.embedding_norm.scale, tensors[f"{name}.enorm.weight"])
    np.testing.assert_array_equal(module.hidden_norm.scale, tensors[f"{name}.hnorm.weight"])
    np.testing.assert_array_equal(module.project, tensors[f"{name}.eh_proj.weight"].T)
    np.testing.assert_array_equal(module.final_norm.scale, tensors[f"{name}.shared_head.norm.weight"])
    np.testing.assert_array_equal(module.layer.mixer.out, tensors[f"{name}.self_attn.o_proj.weight"].T)
    np.testing.assert_array_equal(module.layer.mlp.up[1], tensors[f"{name}.mlp.experts.1.up_proj.weight"].T)


@pytest.mark.parametrize("copies", ["with the tables", "without"])
def test_files_without_modules_are_the_main_model(copies, tmp_path):
    """As transformers writes them: config.json counts modules that are not there."""
    tensors = write_modules(tmp_path)
    main = flatten(load_huggingface(tmp_path)[0])
    unwanted = [name for name in tensors if name.startswith(f"model.layers.{LAYERS + 1}.")]
    unwanted += [name for name in tensors if name.startswith(f"model.layers.{LAYERS}.")]
    if copies == "without":
        change(tmp_path, **dict.fromkeys(unwanted))
    else:
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 0}))
    model, _ = load_huggingface(tmp_path)
    assert model.config.multi_token is None
    for path, x in flatten(model).items():
        np.testing.assert_array_equal(x, main[path], err_msg=path)
    (tmp_path / "out").mkdir()
    export_model(tmp_path, tmp_path / "out", format="hf")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_modules_that_do_not_fit_are_refused(tmp_path):
    tensors = write_modules(tmp_path)
    name = f"model.layers.{LAYERS}"
    for own in (f"{name}.embed_tokens.weight", f"{name}.shared_head.head.weight"):
        change(tmp_path, **{own: tensors[own] + 1})
        with pytest.raises(CheckpointError, match=f"{own} differs from .*num_nextn_predict_layers to 0"):
            load_huggingface(tmp_path)
        # It need not be there.
        change(tmp_path, **{own: None})
        assert load_huggingface(tmp_path)[0].multi_token
    change(tmp_path, **{f"{name}.hnorm.weight": None})
    with pytest.raises(CheckpointError, match=rf"{name}\.hnorm\.weight is missing"):
        load_huggingface(tmp_path)


def test_classifiers_have_no_modules(tmp_path):
    settings = {**CASE, "architectures": ["DeepseekV3ForSequenceClassification"], "id2label": {"0": "reward"}}
    write_folder(tmp_path, settings)
    assert load_huggingface(tmp_path)[0].config.labels == ("reward",)


def test_import_leaves_no_module_out(tmp_path, capsys):
    write_modules(tmp_path)
    assert main(["import", "hf", str(tmp_path), str(tmp_path / "run")]) == 0
    assert f"{MODULES} prediction modules" in capsys.readouterr().out
    assert jax.tree.leaves(load_any_model(tmp_path / "run")[0].multi_token)
