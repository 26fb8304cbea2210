"""Reports, questions and answers of the finance recipe, made from numbers without any download.

A report is a table of the current and the prior year, and a sentence. A question is of one of seven kinds. Its answer
cites each number where it is used, `[table 1, revenue, current] 74 - [table 1, revenue, prior] 61 = 13`, or is
`not stated`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("lookup", "text", "difference", "growth", "margin", "comparison", "not stated")
NOT_STATED = "not stated"
YEARS = ("current", "prior")

_TABLE_ITEMS = ("wages", "rent", "taxes", "debt", "cash", "stock")
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
    """A company's numbers of the current and the prior year.

    table: (current, prior) value of each item, in millions; revenue and costs are always among them.
    text: the same for the one item that the sentence tells, in units.
    """

    company: str
    table: dict[str, tuple[int, int]]
    text: dict[str, tuple[int, int]]

    @property
    def shown(self) -> str:
        """The report as a text."""
        rows = [
            f"| {item} | {year} | {value} |"
            for item, values in self.table.items()
            for year, value in zip(YEARS, values, strict=True)
        ]
        told = [
            f"in the {year} year {item} numbered {value}"
            for item, values in self.text.items()
            for year, value in zip(YEARS, values, strict=True)
        ]
        return "\n".join([f"Report of {self.company}, in millions", "Table 1", *rows, f"Text 1: {', '.join(told)}."])

    def value(self, place: str, item: str, year: str) -> int:
        """The number at a place, `table 1` or `text 1`.

        Raises:
          KeyError, ValueError: the report has no such item, or no such year.
        """
        return {"table 1": self.table, "text 1": self.text}[place][item][YEARS.index(year)]


@dataclass(frozen=True)
class Question:
    """A question about a report, with the only right answer.

    answer: the worked answer, with its citations.
    value: what it ends with: a number, a year, or `not stated`.
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
    """A report with random numbers of two digits, which differ in both years; costs are below revenue."""
    costs = _two_numbers(rng, 10, 89)
    revenue = _two_numbers(rng, max(costs) + 1, 99)
    table = {"revenue": revenue, "costs": costs, rng.choice(_TABLE_ITEMS): _two_numbers(rng, 10, 99)}
    text = {rng.choice(_TEXT_ITEMS): _two_numbers(rng, 10, 99)}
    return Report(company, table, text)


def ask(report: Report, kind: str, rng: random.Random) -> Question:
    """A question of a kind."""
    item, year, told = rng.choice(list(report.table)), rng.choice(YEARS), next(iter(report.text))
    if kind == "lookup":
        return _question(kind, f"What was {item} in the {year} year?", [_cited(report, "table 1", item, year)])
    if kind == "text":
        asked = f"How many {told} were there in the {year} year?"
        return _question(kind, asked, [_cited(report, "text 1", told, year)])
    if kind == NOT_STATED:
        missing = rng.choice([name for name in _TABLE_ITEMS if name not in report.table])
        return Question(kind, f"What was {missing} in the {year} year?", NOT_STATED, NOT_STATED, ())
    after, before = (_cited(report, "table 1", item, each) for each in YEARS)
    b, a = report.table[item]
    if kind == "difference":
        return _question(kind, f"By how much did {item} change?", [after, "-", before, "=", str(b - a)])
    if kind == "growth":
        percent = round(100 * (b - a) / a)
        steps = [after, "-", before, "=", f"{b - a},", f"{b - a} / {a} =", f"{percent}%"]
        return _question(kind, f"By what percentage did {item} change?", steps)
    if kind == "margin":
        revenue, costs = (_cited(report, "table 1", name, year) for name in ("revenue", "costs"))
        r, c = (report.value("table 1", name, year) for name in ("revenue", "costs"))
        percent = round(100 * (r - c) / r)
        steps = [revenue, "-", costs, "=", f"{r - c},", f"{r - c} / {r} =", f"{percent}%"]
        return _question(kind, f"What was the profit margin in the {year} year?", steps)
    if kind == "comparison":
        sign, higher = (">", "current") if b > a else ("<", "prior")
        return _question(kind, f"In which year was {item} higher?", [after, sign, before, ":", higher])
    raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")


def facts(report: Report, rng: random.Random) -> list[str]:
    """Every number of a report with its citation, in random order, as an analyst excerpts it."""
    cited = [
        _cited(report, place, item, year)
        for place, items in (("table 1", report.table), ("text 1", report.text))
        for item in items
        for year in YEARS
    ]
    rng.shuffle(cited)
    return cited


def questions(report: Report, rng: random.Random, count: int = 4) -> list[str]:
    """Questions about a report, each with its answer in the same line."""
    asked = [ask(report, kind, rng) for kind in rng.sample(KINDS, count)]
    return [f"{question.text} {question.answer}" for question in asked]


def drill(rng: random.Random, count: int = 12) -> str:
    """Lines of arithmetic: differences, and shares in percent."""
    lines = []
    for _ in range(count):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        lines.append(rng.choice([f"{a} - {b} = {a - b}", f"{a - b} / {b} = {round(100 * (a - b) / b)}%"]))
    return "\n".join(lines)


def _two_numbers(rng: random.Random, low: int, high: int) -> tuple[int, int]:
    first, second = rng.sample(range(low, high + 1), 2)
    return first, second


def _cited(report: Report, place: str, item: str, year: int) -> str:
    return f"[{place}, {item}, {year}] {report.value(place, item, year)}"


def _question(kind: str, text: str, parts: Sequence[str]) -> Question:
    sources = tuple(part[1 : part.index("]")] for part in parts if part.startswith("["))
    value = parts[-1].rpartition(" ")[2]
    return Question(kind, text, " ".join(parts).replace(" :", ":"), value, sources)
