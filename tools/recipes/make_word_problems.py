"""Data of configs/recipes/word_problems: word problems of one and two steps in GSM8K's format, without any download.

    python tools/recipes/make_word_problems.py runs/word_problems/data

Writes train.jsonl and test.jsonl, which have no question in common. As in GSM8K (arXiv:2110.14168), a record has a
`question` and an `answer`: a sentence for each step with its calculation as <<3*4=12>>12, then a line `#### 12`.
"""

import json
import operator
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

SIZES = {"train": 6000, "test": 400}
LARGEST = 40  # of the results, so that a small model can learn the arithmetic
NAMES = (
    *("Amy", "Ben", "Carla", "Dan", "Emma", "Finn", "Grace", "Hugo", "Ivy", "Jack"),
    *("Kate", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Umar", "Vera", "Will"),
)
THINGS = (
    *("apples", "balls", "books", "cards", "coins", "eggs", "flags", "kites"),
    *("lamps", "maps", "nuts", "pens", "plums", "rings", "shells", "stamps", "toys"),
)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@dataclass(frozen=True)
class Template:
    """A question, and for each step a sentence with one calculation in << >>; `x` is the result of the first."""

    question: str
    steps: tuple[str, ...]


ONE_STEP = (
    Template(
        "{name} has {a} {things}. {friend} gives {name} {b} more. How many {things} does {name} have now?",
        ("{name} has {a} + {b} = <<{a}+{b}>> {things}.",),
    ),
    Template(
        "{name} had {a} {things} and lost {b} of them. How many {things} are left?",
        ("There are {a} - {b} = <<{a}-{b}>> {things} left.",),
    ),
    Template(
        "There are {a} boxes with {b} {things} in each of them. How many {things} are there?",
        ("There are {a} * {b} = <<{a}*{b}>> {things}.",),
    ),
    Template(
        "{name} has {b} {things}, and {friend} has {a} times as many. How many {things} does {friend} have?",
        ("{friend} has {a} * {b} = <<{a}*{b}>> {things}.",),
    ),
    Template(
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each of them get?",
        ("Each friend gets {a} / {b} = <<{a}/{b}>> {things}.",),
    ),
    Template(
        "{name} needs {a} {things} and already has {b}. How many more {things} does {name} need?",
        ("{name} needs {a} - {b} = <<{a}-{b}>> more {things}.",),
    ),
)

TWO_STEPS = (
    Template(
        "{name} has {a} {things}. {friend} gives {name} {b} more, and then {name} loses {c}. "
        "How many {things} does {name} have now?",
        (
            "With those of {friend}, {name} has {a} + {b} = <<{a}+{b}>> {things}.",
            "Then {name} has {x} - {c} = <<{x}-{c}>> {things}.",
        ),
    ),
    Template(
        "{name} buys {a} bags with {b} {things} in each of them and finds {c} more {things}. "
        "How many {things} does {name} have?",
        (
            "The bags have {a} * {b} = <<{a}*{b}>> {things}.",
            "In all {name} has {x} + {c} = <<{x}+{c}>> {things}.",
        ),
    ),
    Template(
        "{name} has {b} {things}, and {friend} has {a} times as many. How many {things} do they have together?",
        (
            "{friend} has {a} * {b} = <<{a}*{b}>> {things}.",
            "Together they have {b} + {x} = <<{b}+{x}>> {things}.",
        ),
    ),
    Template(
        "{name} fills {a} boxes with {b} {things} each and gives {c} of the {things} to {friend}. "
        "How many {things} does {name} keep?",
        (
            "The boxes have {a} * {b} = <<{a}*{b}>> {things}.",
            "{name} keeps {x} - {c} = <<{x}-{c}>> {things}.",
        ),
    ),
    Template(
        "{name} has {a} {things}, and {friend} has {b} more than {name}. How many {things} do they have together?",
        (
            "{friend} has {a} + {b} = <<{a}+{b}>> {things}.",
            "Together they have {a} + {x} = <<{a}+{x}>> {things}.",
        ),
    ),
)


def calculate(expression: str) -> float:
    """The value of two whole numbers and an operation, such as 3*4."""
    left, operation, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", expression).groups()
    return OPERATIONS[operation](int(left), int(right))


def solution(template: Template, values: dict[str, str | int]) -> str | None:
    """The steps and the line of the final number; None if a result is no whole number from 1 to LARGEST."""
    lines, values = [], dict(values)
    for step in template.steps:
        sentence = step.format(**values)
        expression = re.search("<<(.+)>>", sentence)[1]
        result = calculate(expression)
        if result not in range(1, LARGEST + 1):
            return None
        values["x"] = int(result)
        lines.append(sentence.replace(f"<<{expression}>>", f"<<{expression}={int(result)}>>{int(result)}"))
    return "\n".join([*lines, f"#### {values['x']}"])


def problem(rng: random.Random) -> dict[str, str]:
    """A record of a template with one or with two steps, which are equally frequent."""
    template = rng.choice(rng.choice((ONE_STEP, TWO_STEPS)))
    name, friend = rng.sample(NAMES, 2)
    while True:
        numbers = {"a": rng.randint(2, 20), "b": rng.randint(2, 12), "c": rng.randint(2, 12)}
        values = {"name": name, "friend": friend, "things": rng.choice(THINGS), **numbers}
        if (answer := solution(template, values)) is not None:
            return {"question": template.question.format(**values), "answer": answer}


def main(folder: Path) -> None:
    rng = random.Random(0)
    answers: dict[str, str] = {}
    while len(answers) < sum(SIZES.values()):
        record = problem(rng)
        answers[record["question"]] = record["answer"]
    records = iter([{"question": question, "answer": answer} for question, answer in answers.items()])
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        lines = [f"{json.dumps(next(records))}\n" for _ in range(size)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
