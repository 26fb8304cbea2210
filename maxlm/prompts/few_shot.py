"""Which examples a prompt shows (few-shot, arXiv:2005.14165)."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import xxhash

from maxlm.errors import DataError

# Scripts without spaces between words: Han, kana, Thai, Lao, Khmer, Myanmar. Hangul too, whose words take endings.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_TERM = re.compile(rf"[{_UNSPACED}]+|[^\W_{_UNSPACED}]+")


class Bm25:
    """Similarity of texts by the words that they share, and by pairs of characters in scripts without spaces.

    Rare terms count more, repeated ones ever less, and long texts are penalized (Robertson and Zaragoza, The
    Probabilistic Relevance Framework, 2009, with an inverse document frequency that is never negative).
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75):
        counts = [Counter(terms(text)) for text in texts]
        lengths_D = np.array([sum(count.values()) for count in counts], np.float64)
        average = lengths_D.mean() if lengths_D.any() else 1.0
        norms_D = k1 * (1 - b + b * lengths_D / average)
        postings: dict[str, list[tuple[int, float]]] = {}
        for document, count in enumerate(counts):
            for term, times in count.items():
                postings.setdefault(term, []).append((document, times * (k1 + 1) / (times + norms_D[document])))
        self._num_texts = len(texts)
        self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for term, found in postings.items():
            inverse_frequency = np.log1p((len(texts) - len(found) + 0.5) / (len(found) + 0.5))
            documents, saturated = zip(*found)
            self._weights[term] = np.array(documents), inverse_frequency * np.array(saturated)

    def scores(self, query: str) -> np.ndarray:
        """The similarity of each text to the query: float64 [number of texts], 0 or more."""
        scores_D = np.zeros(self._num_texts)
        for term, times in Counter(terms(query)).items():
            if term in self._weights:
                documents, weights = self._weights[term]
                scores_D[documents] += times * weights
        return scores_D


def terms(text: str) -> list[str]:
    """The words of a text without case, and in scripts without spaces its characters and their pairs."""
    found: list[str] = []
    for run in _TERM.findall(unicodedata.normalize("NFKC", text).casefold()):
        if re.match(f"[{_UNSPACED}]", run):
            found += [*run, *(run[start : start + 2] for start in range(len(run) - 1))]
        else:
            found.append(run)
    return found


class ExampleSelector:
    """Selects examples for a question; the same ones in every run, whatever else is asked.

    Of examples with the same question, only the first is used, and never one that has the question that is asked.

    Args:
      questions: of the examples.
      labels: of the examples, for `balanced`.
      where: the file of the examples, for messages.
    """

    def __init__(
        self,
        questions: Sequence[str],
        *,
        select: Literal["random", "similar", "balanced"],
        labels: Sequence[str] | None = None,
        seed: int = 0,
        where: str = "examples",
    ):
        self._select, self._seed, self._where = select, seed, where
        first: dict[str, int] = {}
        for index, question in enumerate(questions):
            first.setdefault(_plain(question), index)
        self._plain, self._indices = list(first), list(first.values())
        self._labels = None if labels is None else [labels[index] for index in self._indices]
        self._similar = Bm25([questions[index] for index in self._indices]) if select == "similar" else None

    def select(self, question: str, count: int) -> list[int]:
        """The indices of `count` examples, in the order to show them: the most similar one last.

        Raises:
          DataError: there are fewer.
        """
        plain = _plain(question)
        usable = [place for place, other in enumerate(self._plain) if other != plain]
        if len(usable) < count:
            raise DataError(
                f"{self._where}: has {len(usable)} different examples besides the question itself, and {count} are"
                " to be shown; add examples, or lower examples.count"
            )
        rng = np.random.default_rng([self._seed, xxhash.xxh3_64_intdigest(plain.encode("utf-8", "surrogatepass"))])
        shuffled = [usable[place] for place in rng.permutation(len(usable))]
        if self._similar is not None:
            scores_D = self._similar.scores(question)
            # Stable: of equally similar ones, the earlier.
            chosen = sorted(usable, key=lambda place: -scores_D[place])[:count][::-1]
        elif self._labels is not None:
            chosen = _in_turn(shuffled, self._labels)[:count]
        else:
            chosen = shuffled[:count]
        return [self._indices[place] for place in chosen]


def _in_turn(places: Sequence[int], labels: Sequence[str]) -> list[int]:
    """One place of each label after the other, while there are any."""
    by_label: dict[str, list[int]] = {}
    for place in places:
        by_label.setdefault(labels[place], []).append(place)
    rounds = max(map(len, by_label.values()))
    return [group[turn] for turn in range(rounds) for group in by_label.values() if turn < len(group)]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
