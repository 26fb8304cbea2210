"""Keep the model's answers that the rules find right, next to the annotated ones.

    python tools/recipes/finance_filter.py runs/finance/data runs/finance/answers

Reads new.jsonl of the data and chats.jsonl of `maxlm feedback`, whose `id` names the line of each question. Writes
built.jsonl into the data: annotated.jsonl, and each question of new.jsonl with the model's answer. Prints how many
answers of each kind of question passed.
"""

import sys
from collections import Counter
from pathlib import Path

from finance_rules import right_citations, right_number
from stages import read, write


def main(data: Path, answers: Path) -> None:
    asked = read(data / "new.jsonl")
    sampled, kept = Counter(), []
    for chat in read(answers / "chats.jsonl"):
        record = asked[int(chat["id"].rpartition(":")[2]) - 1]
        answer = chat["messages"][-1]["content"].strip()
        sampled[record["kind"]] += 1
        if all(rule(None, [answer], record) == [1.0] for rule in (right_number, right_citations)):
            kept.append({**record, "answer": answer})
    counts = Counter(record["kind"] for record in kept)
    for kind, count in sampled.items():
        print(f"{kind}: kept {counts[kind]} of {count} answers")
    built = [*read(data / "annotated.jsonl"), *kept]
    write(data / "built.jsonl", built)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
