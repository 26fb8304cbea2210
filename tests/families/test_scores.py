"""Reward models and classifiers against transformers, both ways."""

import json

import numpy as np
import pytest
from drawn_weights import inputs
from family_cases import SCORE_CASES, file_name
from family_comparison import GOLDEN, compare_scores, write_folder

import maxlm
from maxlm.cli import main
from maxlm.errors import CheckpointError, RequestError
from maxlm.interop.load import load_reward_model


@pytest.mark.parametrize("name", SCORE_CASES)
def test_same_as_transformers_both_ways(name, tmp_path):
    compared = compare_scores(name, tmp_path)
    assert compared.scores < 1e-5
    assert compared.gradient_norm < 1e-5
    assert compared.same_tensors
    assert compared.same_model
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == SCORE_CASES[name]["architectures"]
    tokens, mask = inputs()
    scores = np.load(GOLDEN / f"{file_name(name)}.npz")["scores"]
    np.testing.assert_allclose(maxlm.load(tmp_path).logits(tokens, mask), scores, atol=1e-5, rtol=0)


def test_each_model_is_refused_where_it_does_not_fit(tmp_path, capsys):
    write_folder(tmp_path, SCORE_CASES["qwen2, three classes"])
    with pytest.raises(CheckpointError, match="a classifier of 3 labels, not a reward model"):
        load_reward_model(tmp_path)
    with pytest.raises(RequestError, match=r"scores whole texts \(bad, fair, good\) and predicts no tokens"):
        maxlm.load(tmp_path).generate("x", max_new_tokens=1)
    assert main(["export", str(tmp_path), str(tmp_path / "int8"), "--data", str(tmp_path)]) == 2
    assert "which cannot generate text" in capsys.readouterr().err
