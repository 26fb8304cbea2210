import json

import numpy as np
import pytest
from corpora import make_text, write_jsonl

from maxlm.data.decontaminate import count_overlaps, evaluation_ngrams
from maxlm.data.shingles import hash_words
from maxlm.errors import DataError


def overlaps(text: str, ngrams: np.ndarray, size: int) -> int:
    return count_overlaps(hash_words(text), ngrams, size)


def test_overlap_counts_match_a_brute_force_search(tmp_path):
    tests = [make_text(seed, 40) for seed in range(20)]
    rows = [{"question": tests[0], "choices": tests[1:10], "nested": [{"answer": tests[10]}, 5, None]}]
    ngrams = evaluation_ngrams([write_jsonl(tmp_path / "eval.jsonl", rows)], 8)
    runs = {tuple(t.split()[i : i + 8]) for t in tests[:11] for i in range(33)}
    assert len(ngrams) == len(runs)
    for seed in range(20):
        cut = " ".join(tests[seed].split()[5:20])
        text = f"{make_text(seed + 100)} {cut} {make_text(seed + 200)}"
        words = text.split()
        expected = sum(tuple(words[i : i + 8]) in runs for i in range(len(words) - 7))
        assert overlaps(text, ngrams, 8) == expected
        assert (expected > 0) == (seed <= 10)


def test_overlaps_ignore_case_and_punctuation(tmp_path):
    ngrams = evaluation_ngrams([write_jsonl(tmp_path / "a.jsonl", [{"q": "What is the capital of France?"}])], 6)
    assert overlaps("so: WHAT is, the -- capital... of France", ngrams, 6) == 1
    assert overlaps("what is the capital of Spain", ngrams, 6) == 0


def test_without_files_nothing_overlaps():
    assert overlaps(make_text(0), evaluation_ngrams([], 13), 13) == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no such file"),
        ("{broken", "a.jsonl:1: is not JSON"),
        (json.dumps({"q": "too short"}), "has no string of 13 words"),
    ],
)
def test_evaluation_file_without_ngrams_is_an_error(tmp_path, content, sentence):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=sentence):
        evaluation_ngrams([str(path)], 13)
