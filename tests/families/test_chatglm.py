"""ChatGLM against its authors' code: logits, gradient, greedy text, the way back; what is refused."""

import numpy as np
import pytest
from chatglm_comparison import CASES, compare_with_authors, golden_file, rows
from family_comparison import write_folder

from maxlm.errors import CheckpointError
from maxlm.generate.model import load


@pytest.mark.parametrize("name", CASES)
def test_same_as_the_authors_code_both_ways(name, tmp_path):
    compared = compare_with_authors(name, tmp_path)
    assert compared.logits < 1e-4
    assert compared.loss < 1e-5
    assert compared.gradient_norm < 1e-3
    assert compared.same_greedy
    assert compared.same_tensors
    assert compared.same_model


def test_loaded_model_takes_prefixes(tmp_path):
    write_folder(tmp_path, CASES["chatglm, first"])
    texts, prefix_lengths = rows()
    got = load(tmp_path).logits(texts[0][None], prefix_lengths=prefix_lengths[:1])
    expected = np.load(golden_file("chatglm, first"))["logits"][: len(texts[0])]
    np.testing.assert_allclose(got[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("chatglm 2", {"multi_query_attention": False}, "multi_query_attention is not set"),
        (
            "chatglm, first",
            {"position_encoding_2d": False},
            "position_encoding_2d is False, which",
        ),
        ("chatglm, first", {"quantization_bit": 4}, "quantization_bit is 4"),
        ("chatglm, first", {"pre_seq_len": 8}, "pre_seq_len is 8"),
    ],
)
def test_settings_that_change_the_function_are_refused(name, setting, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        write_folder(tmp_path, CASES[name] | setting)
