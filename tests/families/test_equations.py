"""Baichuan and ChatGLM, which transformers does not have, against their equations; settings that they lack."""

import json

import pytest
from family_comparison import write_folder
from family_equations import BAICHUAN, CASES, CHATGLM, compare_with_equations

from maxlm.errors import CheckpointError
from maxlm.families.family import families
from maxlm.interop.huggingface import load_huggingface, read_description


@pytest.mark.parametrize("name", CASES)
def test_same_as_equations_both_ways(name, tmp_path):
    compared = compare_with_equations(name, tmp_path)
    assert compared.logits < 1e-4
    assert compared.cached_logits < 1e-4
    assert compared.same_tensors
    assert compared.same_model


def test_each_family_that_transformers_does_not_have_has_a_case():
    wanted = {name for name, family in families().items() if not family.is_in_transformers}
    assert {case["model_type"] for case in CASES.values()} == wanted


def test_length_that_is_missing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="model_max_length is missing"):
        write_folder(tmp_path, BAICHUAN | {"vocab_size": 64_000})


@pytest.mark.parametrize(("changes", "is_normalized"), [({}, False), ({"z_loss_weight": 0}, True)])
def test_other_vocabularies_are_of_the_generation_that_the_settings_are_of(changes, is_normalized, tmp_path):
    write_folder(tmp_path, BAICHUAN | {"vocab_size": 199, "max_position_embeddings": 32} | changes)
    model, _ = load_huggingface(tmp_path)
    assert model.config.normalized_head == is_normalized


def test_longer_texts_of_chatglm_2_are_told_from_those_of_3(tmp_path):
    """Both have `rope_ratio`, and use it differently."""
    settings = CHATGLM | {"padded_vocab_size": 65_024, "rope_ratio": 50}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="rope_ratio is 50, which ChatGLM 2 and 3 use differently"):
        read_description(tmp_path)
    file.write_text(json.dumps(settings | {"_name_or_path": "THUDM/chatglm3-6b-32k"}))
    _, description = read_description(tmp_path)
    assert next(description.model.each_layer()).mixer.rope.theta == 500_000
