"""Fill-in-the-middle: what is moved, what stays, and that rows depend on nothing but seed, step and row."""

import numpy as np
import pytest

from maxlm.errors import TokenizerError
from maxlm.objectives.fill_in_the_middle import FillInTheMiddle, Marks

PREFIX, SUFFIX, MIDDLE, BOS, EOS = 90, 91, 92, 1, 2
MARKS = Marks(PREFIX, SUFFIX, MIDDLE, EOS)
LENGTHS = [[20, 12, 4, 12], [30, 18], [48]]


def objective(**settings) -> FillInTheMiddle:
    return FillInTheMiddle(sources=[{"path": "nowhere"}], **settings)


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    """Rows of whole documents, and one whose only document goes on in the next row."""
    tokens, segments = [], []
    for lengths in LENGTHS:
        documents = [[BOS, *range(10, 10 + length - 2), EOS] for length in lengths]
        tokens.append([token for document in documents for token in document])
        segments.append(np.repeat(np.arange(1, len(lengths) + 1), lengths))
    tokens[2][-1] = 77
    tokens, segments = np.array(tokens, np.int32), np.array(segments, np.int32)
    targets = np.roll(tokens, -1, axis=1)
    weights = (np.roll(segments, -1, axis=1) == segments).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "segment_ids": segments, "loss_weights": weights}


def documents(rows) -> list[np.ndarray]:
    return [
        tokens[segments == number]
        for tokens, segments in zip(rows["tokens"], rows["segment_ids"])
        for number in range(1, segments.max() + 1)
    ]


def parts(document: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prefix, middle and suffix of a document that was cut; if the suffix came first, the prefix is in the middle."""
    inner = document[1:-1]
    prefix, suffix, middle = (int(np.flatnonzero(inner == mark)[0]) for mark in (PREFIX, SUFFIX, MIDDLE))
    assert prefix == 0
    return inner[1:suffix], inner[middle + 1 :], inner[suffix + 1 : middle]


@pytest.mark.parametrize("suffix_first", [0.0, 1.0])
def test_parts_are_those_of_the_document(suffix_first, rows):
    cut = objective(rate=1.0, suffix_first_rate=suffix_first).rearranged(rows, MARKS, 0, 5, 0)
    for before, after in zip(documents(rows), documents(cut)):
        if len(before) < 8 or before[-1] != EOS:
            np.testing.assert_array_equal(after, before)
            continue
        assert (after[0], after[-1], len(after)) == (BOS, EOS, len(before))
        prefix, middle, suffix = parts(after)
        np.testing.assert_array_equal(np.concatenate([prefix, middle, suffix]), before[1:-4])
    same_document = rows["loss_weights"] > 0
    np.testing.assert_array_equal(cut["targets"][same_document], np.roll(cut["tokens"], -1, axis=1)[same_document])
    np.testing.assert_array_equal(cut["targets"][~same_document], rows["targets"][~same_document])


def test_share_of_documents_that_are_cut(rows):
    assert np.array_equal(objective(rate=0.0).rearranged(rows, MARKS, 0, 0, 0)["tokens"], rows["tokens"])
    changed = [
        not np.array_equal(one, other)
        for step in range(200)
        for one, other in zip(documents(rows), documents(objective(rate=0.3).rearranged(rows, MARKS, 0, step, 0)))
        if len(one) >= 8 and one[-1] == EOS
    ]
    # 1,000 documents: five standard deviations.
    assert abs(np.mean(changed) - 0.3) < 0.08


def test_a_row_depends_only_on_seed_step_and_row(rows):
    cut = lambda rows, step=3, first=0: objective(rate=1.0).rearranged(rows, MARKS, 7, step, first)["tokens"]  # noqa: E731
    second = {name: values[1:2] for name, values in rows.items()}
    np.testing.assert_array_equal(cut(second, first=1), cut(rows)[1:2])
    assert not np.array_equal(cut(rows), cut(rows, step=4))


def test_tokenizer_without_the_marks_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match=r"objective\.prefix_token: '<\|fim_prefix\|>' is no control token"):
        objective().marks(tokenizer)
    names = {
        f"{name}_token": token
        for name, token in zip(("prefix", "suffix", "middle"), ("<|user|>", "<|end|>", "<|bos|>"))
    }
    assert objective(**names).marks(tokenizer).prefix == tokenizer.control_tokens["<|user|>"]
