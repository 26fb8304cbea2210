import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config.data import CleanConfig
from maxlm.data.clean import find_abnormal, normalize

LOOSE = CleanConfig(min_characters=1)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("a \t\n b\t", "a\n b"),
        ("\n\n  indented\n\n\n\n\n\nend \n\n", "  indented\n\n\nend"),
        ("a\0b\x1bc\ufeffd\x7f", "abcd"),
        ("tab\tstays", "tab\tstays"),
        ("cafe\u0301", "café"),
        ("ﬁ ▁ 你好", "ﬁ ▁ 你好"),
    ],
)
def test_normalization(text, clean):
    assert normalize(text, "NFC") == clean


def test_unicode_form_is_configurable():
    assert normalize("ﬁ ①", "NFKC") == "fi 1"
    assert normalize("cafe\u0301", "none") == "cafe\u0301"


@given(st.text())
def test_normalization_is_idempotent_and_keeps_every_visible_character(text):
    once = normalize(text, "NFC")
    assert normalize(once, "NFC") == once
    letters = [c for c in unicodedata.normalize("NFC", text) if c.isalnum()]
    assert [c for c in once if c.isalnum()] == letters


@pytest.mark.parametrize(
    ("text", "config", "reason"),
    [
        ("", LOOSE, "empty"),
        (" \n\t", LOOSE, "empty"),
        ("short", CleanConfig(min_characters=6), "too_short"),
        ("longer", CleanConfig(min_characters=1, max_characters=5), "too_long"),
        ("12 34 -- a", LOOSE, "few_letters"),
        ("same\nline\n" * 20, LOOSE, "repeated_lines"),
    ],
)
def test_abnormal_texts_are_rejected_with_a_reason(text, config, reason):
    found, detail = find_abnormal(text, config)
    assert found == reason
    assert detail


@pytest.mark.parametrize("text", ["short!", "one\ntwo\nthree\none\n", "床前明月光,疑是地上霜。", "x = 1\ny = 2"])
def test_normal_texts_are_kept(text):
    assert find_abnormal(text, LOOSE) is None


def test_each_limit_is_inclusive():
    config = CleanConfig(min_characters=4, max_characters=4, min_letter_fraction=0.5, max_repeated_line_fraction=0.5)
    assert find_abnormal("ab12", config) is None
    assert find_abnormal("a\nbb", config) is None
    assert find_abnormal("a\na\n", config) is None
