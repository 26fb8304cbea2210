"""Data of configs/recipes/finance: reports, questions and annotated answers, without any download.

    python tools/recipes/make_finance.py runs/finance/data

Writes text.jsonl for the tokenizer and for pretraining, chats.jsonl, which make a chat model of the base, and files of
questions with the columns report, question, kind, answer, value and sources: examples.jsonl (shown in prompts),
annotated.jsonl (fine-tuning), new.jsonl (the model answers them itself) and held_out.jsonl (evaluation). No two files
have a company in common, except text.jsonl and chats.jsonl.
"""

import random
import sys
from pathlib import Path
from typing import Any

from finance_reports import (
    KINDS,
    NOT_STATED,
    Report,
    ask,
    company_names,
    drill,
    make_report,
    missing_item,
    notes,
    result,
)
from stages import write

# Companies of each file, and questions about each.
FILES = {"examples": (42, 1), "annotated": (100, 7), "new": (60, 7), "held_out": (50, 7)}
# Documents for pretraining, documents of arithmetic, and chats.
TEXTS, DRILLS, CHATS = 16000, 1600, 3000


def main(folder: Path) -> None:
    rng = random.Random(0)
    names = company_names(rng)
    folder.mkdir(parents=True, exist_ok=True)
    for file, (companies, count) in FILES.items():
        records = []
        for name in [names.pop() for _ in range(companies)]:
            report = make_report(name, rng)
            for _ in range(count):
                # Kinds in turn, so that each file has equally many of each.
                asked = ask(report, KINDS[len(records) % len(KINDS)], rng)
                records.append(
                    {
                        "report": report.shown,
                        "question": asked.text,
                        "kind": asked.kind,
                        "answer": asked.answer,
                        "value": asked.value,
                        "sources": list(asked.sources),
                    }
                )
        write(folder / f"{file}.jsonl", records)
    reports = [make_report(rng.choice(names), rng) for _ in range(TEXTS)]
    texts = ["\n".join([report.shown, *notes(report, rng)]) for report in reports]
    texts += [drill(rng) for _ in range(DRILLS)]
    rng.shuffle(texts)
    write(folder / "text.jsonl", [{"text": text} for text in texts])
    write(folder / "chats.jsonl", [chat(names, rng) for _ in range(CHATS)])


def chat(names: list[str], rng: random.Random) -> dict[str, Any]:
    """A chat as any chat model has seen: short answers, in which no number is cited and no work shown.

    Some have three exchanges, so that the model reads texts of the length of a prompt with examples.
    """
    messages = []
    for _ in range(rng.choice([1, 1, 3])):
        question, answer = exchange(make_report(rng.choice(names), rng), rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def exchange(report: Report, rng: random.Random) -> tuple[str, str]:
    """A question, most often about a report, and its answer."""
    places = {**dict.fromkeys(report.table, "table 1"), **dict.fromkeys(report.text, "text 1")}
    item, place = rng.choice(list(places.items()))
    b, a = sorted(rng.sample(range(10, 100), 2))
    return rng.choice(
        [
            (f"{report.shown}\nHow much is {item}?", str(report.value(place, item))),
            (f"{report.shown}\nWhere is {item}?", f"[{place}]"),
            (f"{report.shown}\nWhere is {missing_item(report, rng)}?", NOT_STATED),
            (f"{report.shown}\nWhich items are in table 1?", ", ".join(report.table)),
            (f"{report.shown}\nWhich items does text 1 tell?", " and ".join(report.text)),
            (f"What is {a} - {b}?", result(a, "-", b)),
            (f"What is {a} + {b}?", result(a, "+", b)),
        ]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
