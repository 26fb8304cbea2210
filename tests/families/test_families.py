"""Each family against transformers: logits, gradient, greedy text, and the way back."""

import pytest
from family_cases import CASES
from family_comparison import compare

from maxlm.families.family import families


@pytest.mark.parametrize("name", CASES)
def test_same_as_transformers_both_ways(name, tmp_path):
    compared = compare(name, tmp_path)
    assert compared.logits < 1e-4
    assert compared.cached_logits < 1e-4
    assert compared.loss < 1e-5
    assert compared.gradient_norm < 1e-3
    assert compared.same_greedy
    assert compared.same_tensors
    assert compared.same_model


def test_each_family_of_transformers_has_a_case():
    wanted = {name for name, family in families().items() if family.is_in_transformers}
    assert {case["model_type"] for case in CASES.values()} == wanted
