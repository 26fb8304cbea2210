"""Published models: numbers of parameters, use as a base, `maxlm models`."""

import json
import math

import pytest

from maxlm.cli import main
from maxlm.config.load import load_config
from maxlm.config.recipes import recipes
from maxlm.core.tree import flatten
from maxlm.errors import ConfigError
from maxlm.interop.huggingface import find_family
from maxlm.models.decoder import Decoder

PRESETS = [name for name in recipes() if name.startswith("models/")]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_number_of_parameters(name):
    preset = load_config(name, kind="model")
    declared = Decoder(preset.model, preset.execution)
    counted, published = sum(math.prod(each.shape) for each in flatten(declared).values()), preset.about.parameters
    is_rounded = published % 10**6 == 0
    assert counted == pytest.approx(published, rel=0.02) if is_rounded else counted == published
    if preset.model.family is not None:
        assert find_family(declared)[0].model_type == preset.model.family


def test_training_takes_a_preset_as_its_base(tmp_path):
    file = tmp_path / "train.yaml"
    training = "kind: train\noutput: run\nobjective: {kind: pretrain, sources: [{path: data}]}\n"
    file.write_text(f"base: models/gpt-3-125m\n{training}")
    config, preset = load_config(file), load_config("models/gpt-3-125m")
    assert config.model == preset.model
    assert (config.batch_size, config.row_length, config.optim.learning_rate) == (256, 2048, 6e-4)
    file.write_text(f"base: models/gpt-5\n{training}")
    with pytest.raises(ConfigError, match="gpt-5"):
        load_config(file)


def test_models_are_listed_and_shown(capsys):
    assert main(["models", "pythia-1", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"pythia-160m", "pythia-1b", "pythia-1.4b", "pythia-12b"} <= {*listed}
    assert main(["models", "llama-3.1-8b", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    size = shown["llama-3.1-8b"]
    assert size["bfloat16"] == 2 * 8_030_261_248
    # Keys and values of 8 heads of 128 channels in 32 layers.
    assert size["cache"] == 131_072 * 2 * 8 * 128 * 32 * 2
    assert size["training"]["adamw"] == pytest.approx(16 * size["parameters"], rel=1e-3)
    assert {fit["device"] for fit in shown["meshes"]} == {"TPU v5e", "TPU v6e", "TPU v5p", "H100", "H200"}
    assert main(["models", "nothing"]) == 2
    assert "there is no such model; `maxlm models` lists them" in capsys.readouterr().err
    assert main(["config", "show", "models/gpt2", "--tree"]) == 0
    assert "124,439,808" in capsys.readouterr().out
