"""Data of configs/recipes/sums: sums below 20, without any download.

    python tools/recipes/make_sums.py runs/sums/data

Writes text.txt for the tokenizer and for pretraining, sft.jsonl (prompt and completion), and prompts.jsonl and
valid.jsonl (prompt and answer). The sums of valid.jsonl are in no other file.
"""

import random
import sys
from pathlib import Path

from stages import write

HELD_OUT = 42


def main(folder: Path) -> None:
    rng = random.Random(0)
    sums = [(a, b) for a in range(20) for b in range(20 - a)]
    rng.shuffle(sums)
    valid, train = sums[:HELD_OUT], sums[HELD_OUT:]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{a}+{b}={a + b}" for a, b in train]
    (folder / "text.txt").write_text("".join(f"{rng.choice(lines)}\n" for _ in range(2000)))
    for name, pairs, key in (("sft", train, "completion"), ("prompts", train, "answer"), ("valid", valid, "answer")):
        records = [{"prompt": f"{a}+{b}=", key: str(a + b)} for a, b in pairs]
        write(folder / f"{name}.jsonl", records)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
