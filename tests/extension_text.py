"""Text in a script that the tokenizers of tests split into bytes: sentences of a few words, drawn at random."""

import random

_SENTENCE, _CHARACTERS = 8, [chr(code) for code in range(0x4E00, 0x4E00 + 60)]


def write_text(path, *, sentences: int = 400) -> None:
    """Words of one or two characters, frequent ones first, with an English sentence here and there."""
    draw = random.Random(0)
    words = ["".join(draw.choices(_CHARACTERS, k=draw.randint(1, 2))) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    lines = [
        "".join(draw.choices(words, weights, k=_SENTENCE)) + "，" + draw.choice(words) + "。" for _ in range(sentences)
    ]
    lines[::20] = ["The parameter is the name of a file." for _ in lines[::20]]
    path.write_text("\n".join(lines), encoding="utf-8")
