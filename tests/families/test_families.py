"""Each family against transformers: logits, gradient, greedy text, and the way back."""

import re
from pathlib import Path

import chatglm_comparison
import family_equations
import pytest
from family_cases import CASES, SCORE_CASES, tokenizer_kind
from family_comparison import compare
from tokenizer_kinds import KINDS

from maxlm.families.family import families

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", CASES)
def test_same_as_transformers_both_ways(name, tmp_path):
    compared = compare(name, tmp_path)
    assert compared.logits < 1e-4
    assert compared.cached_logits < 1e-4
    assert compared.loss < 1e-5
    assert compared.gradient_norm < 1e-3
    assert compared.same_greedy
    # At most 3e-3 with weights of eight seeds; of most families, 1e-4.
    assert compared.int8_divergence < 1e-2
    assert not compared.float_matrices
    assert compared.same_tensors
    assert compared.same_model


def test_each_family_of_transformers_has_a_case():
    wanted = {name for name, family in families().items() if family.is_in_transformers}
    assert {case["model_type"] for case in CASES.values()} == wanted


def test_page_lists_each_case():
    """Its numbers are of a run with transformers: tools/family_table.py."""
    rows = [line for line in (ROOT / "docs" / "families.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    listed = {name: tokenizer for name, *_, tokenizer in cells[2:]}
    assert list(listed) == [*CASES, *SCORE_CASES, *chatglm_comparison.CASES, *family_equations.CASES]
    for name in CASES | SCORE_CASES:
        assert tokenizer_kind(name).removesuffix(", tokenizer.json") in KINDS
        assert listed[name] == f"{tokenizer_kind(name)}: yes"


def test_page_about_adding_a_family_shows_the_real_one():
    page = (ROOT / "docs" / "adding-a-model.md").read_text().partition("## Adding a family")[2]
    source = (ROOT / "maxlm" / "families" / "stablelm.py").read_text()
    shown = re.findall(r"```python\n(.*?)```", page, re.S)
    imports = source[: source.index(shown[0])]
    assert source == imports + "\n\n".join(shown)
    assert f"{len(source.splitlines())} lines" in page
