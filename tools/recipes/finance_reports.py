"""Reports, questions and answers of the finance recipe, made from numbers without any download.

A report is a table, and a sentence. A question is of one of seven kinds. Its answer cites each number where it is used,
`[table 1, revenue] 74 - [table 1, costs] 61 = 13`, or is `not stated`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("lookup", "text", "difference", "total", "share", "comparison", "not stated")
NOT_STATED = "not stated"

_TABLE_ITEMS = ("wages", "rent", "taxes", "debt", "cash", "stock", "loans", "goods")
_TEXT_ITEMS = ("employees", "shops", "plants", "trucks")
_BEGINNINGS = (
    "Al",
    "Bor",
    "Cal",
    "Dan",
    "El",
    "Fer",
    "Gar",
    "Hol",
    "Kor",
    "Lin",
    "Mar",
    "Nor",
    "Ost",
    "Per",
    "Sol",
    "Tor",
)
_ENDINGS = ("ava", "dex", "eno", "gard", "ika", "lund", "mont", "nia", "ora", "stad", "tek", "vik")
_BRANCHES = ("Foods", "Metals", "Paper", "Energy", "Glass", "Textiles")


@dataclass(frozen=True)
class Report:
    """A company's numbers.

    table: the value of each item, in millions; revenue and costs are always among them.
    text: the same for the items that the sentence tells, in units.
    """

    company: str
    table: dict[str, int]
    text: dict[str, int]

    @property
    def shown(self) -> str:
        """The report as a text."""
        rows = [f"| {item} | {value} |" for item, value in self.table.items()]
        told = ", ".join(f"{item} numbered {value}" for item, value in self.text.items())
        return "\n".join([f"Report of {self.company}, in millions", "Table 1", *rows, f"Text 1: {told}."])

    def value(self, place: str, item: str) -> int:
        """The number at a place, `table 1` or `text 1`; KeyError if the report has no such item there."""
        return {"table 1": self.table, "text 1": self.text}[place][item]


@dataclass(frozen=True)
class Question:
    """A question about a report, with the only right answer.

    answer: the worked answer, with its citations.
    value: what it ends with: a number, an item, or `not stated`.
    sources: the citations, without brackets.
    """

    kind: str
    text: str
    answer: str
    value: str
    sources: tuple[str, ...]


def company_names(rng: random.Random) -> list[str]:
    """All names, in random order: parts of the list have no name in common."""
    names = [f"{a}{b} {branch}" for a in _BEGINNINGS for b in _ENDINGS for branch in _BRANCHES]
    rng.shuffle(names)
    return names


def make_report(company: str, rng: random.Random) -> Report:
    """A report with random numbers of two digits, no two of which are equal; costs are below revenue."""
    costs, revenue, *others = rng.sample(range(10, 100), 7)
    costs, revenue = sorted((costs, revenue))
    table = {"revenue": revenue, "costs": costs, **dict(zip(rng.sample(_TABLE_ITEMS, 3), others))}
    order = rng.sample(list(table), len(table))
    text = dict(zip(rng.sample(_TEXT_ITEMS, 2), others[3:]))
    return Report(company, {item: table[item] for item in order}, text)


def ask(report: Report, kind: str, rng: random.Random) -> Question:
    """A question of a kind."""
    first, second = rng.sample(list(report.table), 2)
    a, b = report.table[first], report.table[second]
    if kind == "lookup":
        return _question(kind, f"What is stated for {first}?", [_cited(report, "table 1", first)])
    if kind == "text":
        told = rng.choice(list(report.text))
        return _question(kind, f"How many {told} were there?", [_cited(report, "text 1", told)])
    if kind == NOT_STATED:
        return Question(kind, f"What is stated for {missing_item(report, rng)}?", NOT_STATED, NOT_STATED, ())
    if kind == "share":
        return _question(kind, "What percentage of revenue were costs?", computed(report, "costs", "/", "revenue"))
    if kind == "total":
        return _question(kind, f"What were {first} and {second} together?", computed(report, first, "+", second))
    if kind == "difference":
        higher, lower = (first, second) if a > b else (second, first)
        asked = f"How much higher was {higher} than {lower}?"
        return _question(kind, asked, computed(report, higher, "-", lower))
    if kind == "comparison":
        sign, higher = (">", first) if a > b else ("<", second)
        parts = [_cited(report, "table 1", first), sign, _cited(report, "table 1", second), ":", higher]
        return _question(kind, f"Which was higher, {first} or {second}?", parts)
    raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")


def missing_item(report: Report, rng: random.Random) -> str:
    """An item of other reports' tables."""
    return rng.choice([item for item in _TABLE_ITEMS if item not in report.table])


def computed(report: Report, first: str, sign: str, second: str) -> list[str]:
    """The parts of a line that computes with two numbers of the table."""
    a, b = report.table[first], report.table[second]
    return [_cited(report, "table 1", first), sign, _cited(report, "table 1", second), "=", result(a, sign, b)]


def result(a: int, sign: str, b: int) -> str:
    """The result of a sign, `/` as a percentage."""
    return {"-": f"{a - b}", "+": f"{a + b}", "/": f"{round(100 * a / b)}%"}[sign]


def notes(report: Report, rng: random.Random) -> list[str]:
    """What an analyst notes of a report, in random order: every number with its citation, and some results."""
    cited = [_cited(report, "table 1", item) for item in report.table]
    cited += [_cited(report, "text 1", item) for item in report.text]
    lines = [" ".join(computed(report, "costs", "/", "revenue"))]
    for sign in "+-":
        pair = rng.sample(list(report.table), 2)
        if sign == "-":
            pair.sort(key=report.table.get, reverse=True)
        lines.append(" ".join(computed(report, pair[0], sign, pair[1])))
    return rng.sample(cited, len(cited)) + rng.sample(lines, len(lines))


def drill(rng: random.Random, count: int = 12) -> str:
    """Lines of arithmetic: differences, totals, and shares in percent."""
    lines = []
    for _ in range(count):
        b, a = sorted(rng.sample(range(10, 100), 2))
        sign = rng.choice("+-/")
        if sign == "/":
            a, b = b, a
        lines.append(f"{a} {sign} {b} = {result(a, sign, b)}")
    return "\n".join(lines)


def _cited(report: Report, place: str, item: str) -> str:
    return f"[{place}, {item}] {report.value(place, item)}"


def _question(kind: str, text: str, parts: Sequence[str]) -> Question:
    sources = tuple(part[1 : part.index("]")] for part in parts if part.startswith("["))
    value = parts[-1].rpartition(" ")[2]
    return Question(kind, text, " ".join(parts).replace(" :", ":"), value, sources)
