import numpy as np
import pytest
from corpora import make_text

from maxlm.data.deduplicate import NearDuplicates, make_signatures
from maxlm.data.shingles import hash_ngrams, hash_words

SETTINGS = {"shingle_words": 3, "num_permutations": 128}


def jaccard(first: str, second: str, size: int = 3) -> float:
    sets = [
        {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} for words in (first.split(), second.split())
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text: str, num_edits: int, seed: int) -> str:
    words = text.split()
    for place in np.random.default_rng(seed).choice(len(words), num_edits, replace=False):
        words[place] = f"new{seed}x{place}"
    return " ".join(words)


def signatures(*texts: str) -> np.ndarray:
    return make_signatures([hash_words(text) for text in texts], **SETTINGS)


# Shingles


def test_hashes_are_equal_only_for_equal_ngrams():
    texts = [make_text(seed, 300) for seed in range(3)]
    texts.append(" ".join(texts[0].split()[100:200]))
    by_hash, by_words = {}, {}
    for text in texts:
        words = text.lower().split()
        for place, value in enumerate(hash_ngrams(hash_words(text), 4).tolist()):
            run = tuple(words[place : place + 4])
            assert by_hash.setdefault(value, run) == run
            assert by_words.setdefault(run, value) == value


def test_words_are_compared_without_case_and_punctuation():
    assert (hash_words("Hello, World!") == hash_words("hello world")).all()
    assert len(hash_words("snake_case x1 naïve")) == 3


def test_scripts_without_spaces_have_one_word_per_character():
    assert len(hash_words("床前明月光 in English です")) == 5 + 2 + 2


def test_order_matters_and_short_texts_have_no_ngrams():
    assert hash_ngrams(hash_words("a b c"), 3) != hash_ngrams(hash_words("c b a"), 3)
    assert hash_ngrams(hash_words("a b c"), 4).size == 0
    assert hash_ngrams(hash_words(""), 1).size == 0


# Signatures


@pytest.mark.parametrize("num_edits", [1, 4, 15, 60])
def test_signatures_estimate_the_jaccard_similarity(num_edits):
    texts = [make_text(seed, 200) for seed in range(40)]
    pairs = [(text, edited(text, num_edits, seed)) for seed, text in enumerate(texts)]
    estimates = [(first == second).mean() for first, second in (signatures(*pair) for pair in pairs)]
    exact = [jaccard(*pair) for pair in pairs]
    # 128 entries have a standard deviation of at most 0.045; the mean of 40 pairs is well within 0.03.
    assert np.mean(estimates) == pytest.approx(np.mean(exact), abs=0.03)
    assert np.abs(np.subtract(estimates, exact)).max() < 0.18


def test_signatures_do_not_depend_on_the_batch():
    texts = [make_text(seed) for seed in range(5)] + ["one", "two words"]
    assert (signatures(*texts) == np.concatenate([signatures(text) for text in texts])).all()


def near(threshold: float = 0.8) -> NearDuplicates:
    return NearDuplicates(threshold=threshold, num_permutations=128)


def test_near_duplicates_are_found_with_their_original():
    originals = [make_text(seed, 200) for seed in range(300)]
    index = near()
    assert [index.add(signature) for signature in signatures(*originals)] == [None] * 300
    copies = [edited(text, 3, seed) for seed, text in enumerate(originals)]
    assert min(map(jaccard, originals, copies)) > 0.9
    found = [index.add(signature) for signature in signatures(*copies)]
    right = [match is not None and match[0] == number for number, match in enumerate(found)]
    assert sum(right) >= 297, "recall at a similarity of 0.9 and a threshold of 0.8"


def test_half_overlapping_texts_are_kept():
    originals = [make_text(seed, 200) for seed in range(300)]
    halves = [edited(text, 40, seed) for seed, text in enumerate(originals)]
    assert 0.2 < np.mean(list(map(jaccard, originals, halves))) < 0.6
    index = near()
    assert not any(index.add(signature) for signature in signatures(*originals, *halves))


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
def test_buckets_miss_few_pairs_at_any_threshold(threshold):
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        first = rng.integers(0, 2**32, 128, dtype=np.uint32)
        second = first.copy()
        changed = rng.choice(128, 128 - int(np.ceil(128 * threshold)), replace=False)
        second[changed] += np.uint32(1)
        index = near(threshold)
        assert index.add(first) is None
        missed += index.add(second) is None
    assert missed <= 6


def test_index_grows_beyond_its_initial_capacity():
    index = near()
    batch = np.random.default_rng(0).integers(0, 2**32, (2500, 128), dtype=np.uint32)
    assert not any(index.add(signature) for signature in batch)
    assert [index.add(signature) for signature in batch[::100]] == [(n, 1.0) for n in range(0, 2500, 100)]
