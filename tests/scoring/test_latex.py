"""Answers in LaTeX are compared as mathematics, and hostile ones are wrong."""

import pytest

from maxlm.scoring.rewards import RewardPart, find_rewards
from maxlm.scoring.rules.exact import Unreadable
from maxlm.scoring.rules.latex import equal, find_answer
from maxlm.scoring.rules.latex_terms import evaluate

SAME = [
    (r"\frac12", "0.5"),
    (r"\dfrac{1}{2}", "1/2"),
    (r"-\frac{1}{3}", r"\frac{-1}{3}"),
    ("0.10", "0.1"),
    (r"\$18.90", "18.9"),
    ("1,000", "1000"),
    (r"1{,}000", "1000"),
    (r"50\%", "50%"),
    (r"50\%", "0.5"),
    (r"90^\circ", "90"),
    (r"5\text{ cm}", "5"),
    (r"10\sqrt{3}\text{ m}^2", r"10\sqrt{3}"),
    ("1 1/2", "1.5"),
    (r"3\frac{1}{2}", "3.5"),
    (r"6 \times 10^{3}", "6000"),
    ("4!", "24"),
    (r"\sqrt{8}", r"2\sqrt2"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    (r"e^{i\pi}", "-1"),
    (r"\log_2 8", "3"),
    (r"\sin^2 x+\cos^2 x", "1"),
    ("(x+1)^2", "x^2+2x+1"),
    ("2x(y+1)", "2xy+2x"),
    ("x_1+x_{2}", "x_2 + x_1"),
    ("(2)(3)", "6"),
    ("x=5", "5"),
    (r"x \in [1,2]", "[1,2]"),
    ("1, 2", "2,1"),
    (r"1 \text{ and } 2", "2,1"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("(1,2)", "(1, 2)"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)"),
    (r"[0,\infty)", r"[0, \infty)"),
    (r"(-\infty,1)\cup(2,3)", r"(2,3) \cup (-\infty, 1)"),
    (r"3\pm\sqrt2", r"3-\sqrt2, 3+\sqrt2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & \frac{8}{2} \end{pmatrix}"),
    (r"\text{Evelyn}", "Evelyn"),
    ("x<3", "x < 3"),
]
DIFFERENT = [
    ("2", "3"),
    ("1/3", "0.333"),
    ("100000000000000000001", "100000000000000000000"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "(1,2)"),
    ("1,2", "1,2,3"),
    ("1,1", "1,2"),
    ("x^2", "2x"),
    ("cat", "act"),
    ("2 3", "6"),
    ("x<3", "x<4"),
    (r"\frac{1}{0}", "1"),
    ("", "0"),
    ("{", "}"),
]
HOSTILE = [
    "9" * 5000,
    "2^{999999999}",
    "2^2^2^2^2^2^2^9",
    "(" * 400 + "1" + ")" * 400,
    "-" * 900 + "1",
    r"\sqrt" * 190 + "2",
    r"\frac" * 190,
    "99!!!!",
    "(9^9)^9^9",
    "," * 900,
    r"\begin{pmatrix}" * 60,
    "{" * 990,
    "$" * 990,
    r"\boxed{" * 140,
]


def test_equal_answers():
    for left, right in SAME:
        assert equal(left, right), (left, right)
        assert equal(right, left), (right, left)


def test_different_answers():
    for left, right in DIFFERENT:
        assert not equal(left, right), (left, right)
        assert not equal(right, left), (right, left)


def test_hostile_answers_are_wrong():
    (reward,) = find_rewards("latex_answer")
    assert reward("?", HOSTILE, {"answer": "1"}, [1] * len(HOSTILE)) == [0.0] * len(HOSTILE)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} or \boxed{\frac{a}{b}}.", r"\frac{a}{b}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\fbox{3} is cut off: \boxed{4", "3"),
        ("thus $x=3$ and $4$", "4"),
        (r"thus \(x=3\)", "x=3"),
        ("4", "4"),
    ],
)
def test_final_answer_of_a_text(text, answer):
    assert find_answer(text) == answer
    assert find_answer("4", require_box=True) is None


def test_reward_of_latex_answers():
    record = {"answer": r"We get \boxed{\frac{1}{2}}"}
    completions = [r"\boxed{0.5}", "$0.5$", "0.5", r"\boxed{0.4}", ""]
    for settings, expected in [({}, [1, 1, 1, 0, 0]), ({"require_box": True}, [1, 0, 0, 0, 0])]:
        (reward,) = find_rewards([RewardPart(name="latex_answer", settings=settings)])
        assert reward("?", completions, record, [1] * 5) == expected


def test_what_is_not_read_is_named():
    for text, reason in [
        ("2 +", "unexpected end"),
        ("a&b", "unexpected &"),
        ("1/0", "division|Fraction"),
        ("", "end"),
    ]:
        with pytest.raises(Unreadable, match=reason):
            evaluate(text, lambda name: 2)
