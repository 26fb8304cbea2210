"""Data of configs/recipes/finance: reports, questions and annotated answers, without any download.

    python tools/recipes/make_finance.py runs/finance/data

Writes text.jsonl for the tokenizer and for pretraining, and files of questions with the columns report, question, kind,
answer, value and sources: examples.jsonl (shown in prompts), annotated.jsonl (fine-tuning), new.jsonl (the model
answers them itself) and held_out.jsonl (evaluation). No two files have a company in common.
"""

import json
import random
import sys
from pathlib import Path

from finance_reports import KINDS, ask, company_names, drill, facts, make_report, questions

# Companies of each file, and questions about each.
FILES = {"examples": (42, 1), "annotated": (100, 7), "new": (60, 7), "held_out": (50, 7)}
# Documents for pretraining, and documents of arithmetic. A document has one report, or some with several.
TEXTS, REPORTS, DRILLS = 9000, (1, 1, 1, 3), 500


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
        (folder / f"{file}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    documents = []
    for _ in range(TEXTS):
        reports = [make_report(rng.choice(names), rng) for _ in range(rng.choice(REPORTS))]
        parts = ["\n".join([report.shown, *facts(report, rng), *questions(report, rng)]) for report in reports]
        documents.append("\n\n".join(parts))
    documents += [drill(rng) for _ in range(DRILLS)]
    rng.shuffle(documents)
    (folder / "text.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in documents))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
