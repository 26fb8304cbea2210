"""Small texts for tests, and JSONL files of them."""

import json
import random

# Words of a made-up language: texts of any length are dissimilar.
WORDS = [
    a + b + c for a in ("ba", "co", "du", "fe", "gi", "ho") for b in "lmnrst" for c in ("a", "en", "is", "o", "ux")
]


def make_text(seed: int, num_words: int = 60) -> str:
    """Random words from a seed, in lines of ten."""
    words = random.Random(seed).choices(WORDS, k=num_words)
    return "\n".join(" ".join(words[start : start + 10]) for start in range(0, num_words, 10))


def write_jsonl(path, rows) -> str:
    """Write one JSON object per line; returns the path as a string."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_jsonl(path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
