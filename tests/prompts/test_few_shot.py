"""Selection of examples: BM25 against its equation, and what every selection keeps to."""

import math
import re
from collections import Counter

import numpy as np
import pytest

from maxlm.errors import DataError
from maxlm.prompts.few_shot import Bm25, ExampleSelector, terms

TEXTS = [
    "The cat sat on the mat",
    "A dog chased the cat, the black cat",
    "Interest rates rose again",
    "The bank raised its interest rate, and rates rose elsewhere",
    "",
]


def reference(texts, query, k1=1.5, b=0.75):
    """The equation, term by term."""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    average = sum(map(len, words)) / len(words)
    scores = []
    for document in words:
        score = 0.0
        for term in re.findall(r"\w+", query.lower()):
            n = sum(term in other for other in words)
            tf = document.count(term)
            idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
            score += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(document) / average))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["the cat", "cat cat", "interest rates of the bank", "zebra", "", "The, THE; the!"])
def test_bm25_equals_its_equation(query):
    np.testing.assert_allclose(Bm25(TEXTS).scores(query), reference(TEXTS, query), rtol=1e-12, atol=0)


def test_terms_of_several_scripts():
    assert terms("GPT-4 costs 3.5 Euro") == ["gpt", "4", "costs", "3", "5", "euro"]
    assert terms("利率上升") == ["利", "率", "上", "升", "利率", "率上", "上升"]
    assert terms("ＧＰＴ模型") == ["gpt", "模", "型", "模型"]
    assert terms("Straße ÉTÉ") == ["strasse", "été"]
    assert terms("!?") == []


def test_similar_examples_share_rare_terms_and_the_most_similar_is_last():
    questions = ["上海的天气怎么样", "利率为什么上升", "猫吃什么", "利率什么时候下降"]
    selector = ExampleSelector(questions, select="similar")
    assert selector.select("美国利率下降了吗", 2) == [1, 3]
    english = ExampleSelector(TEXTS[:4], select="similar")
    assert english.select("Why did the interest rate rise?", 1) == [3]
    # Of equally similar ones, the first.
    assert english.select("zebra", 2) == [1, 0]


def test_random_selection_depends_on_seed_and_question_alone():
    questions = [f"question {number}" for number in range(50)]
    chosen = ExampleSelector(questions, select="random").select("new", 5)
    assert chosen == ExampleSelector(questions, select="random").select("new", 5)
    assert chosen != ExampleSelector(questions, select="random", seed=1).select("new", 5)
    assert chosen != ExampleSelector(questions, select="random").select("other", 5)
    drawn = Counter(
        index for number in range(400) for index in ExampleSelector(questions, select="random").select(str(number), 5)
    )
    # 40 draws each are expected, with a standard deviation of 6.
    assert 15 < min(drawn.values()) <= max(drawn.values()) < 65


def test_labels_are_balanced_while_there_are_enough():
    labels = ["a"] * 20 + ["b"] * 20 + ["c"]
    selector = ExampleSelector([str(number) for number in range(41)], select="balanced", labels=labels)
    for question in ("x", "y", "z"):
        assert Counter(labels[index] for index in selector.select(question, 6)) in (
            Counter(a=3, b=2, c=1),
            Counter(a=2, b=3, c=1),
        )
    # No label always comes first.
    assert len({labels[selector.select(str(number) + "?", 1)[0]] for number in range(30)}) > 1


@pytest.mark.parametrize("select", ["random", "similar", "balanced"])
def test_the_question_itself_is_never_an_example_and_none_is_shown_twice(select):
    questions = ["What is 2 + 2?", "what is 3?", "What is  2 + 2? ", "What is 4?", "What is 4?", "Ｗhat is 5?"]
    labels = list("abcdef")
    selector = ExampleSelector(questions, select=select, labels=labels if select == "balanced" else None)
    for question in [*questions, "What is 5?", "New"]:
        count = 4 if question == "New" else 3
        chosen = selector.select(question, count)
        assert len({*chosen}) == count
        assert {0, 1, 3, 5} >= {*chosen}  # of equal questions the first
        assert " ".join(question.replace("Ｗ", "W").split()) not in {
            " ".join(questions[index].replace("Ｗ", "W").split()) for index in chosen
        }


def test_too_few_examples():
    selector = ExampleSelector(["a", "b", "a"], select="random", where="pool.jsonl")
    assert sorted(selector.select("c", 2)) == [0, 1]
    with pytest.raises(DataError, match=r"pool\.jsonl: has 1 different examples besides the question"):
        selector.select("a", 2)
