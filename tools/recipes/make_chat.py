"""Write the records of the chat recipe from a folder of small public data sets.

    python tools/recipes/make_chat.py DATA runs/chat/data

DATA has the demonstration files of LLaMA-Factory (`sft/alpaca_en.json`, `sft/alpaca_zh.json`, `preference/dpo_en.json`,
`preference/dpo_zh.json`) and poems (`text/tang_poems_zh.jsonl`). The end of each file is held out: a tenth of the
instructions, and a third of the pairs. Answers are cut to what a small model can learn in minutes.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Characters of answers, which are cut, and of prompts at most.
LONGEST_ANSWER = {"en": 500, "zh": 200}
LONGEST_PROMPT = {"en": 400, "zh": 150}
NAMES = {"system": "system", "human": "user", "gpt": "assistant"}


def main(data: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(0)
    chats, held_out_chats, pairs, held_out_pairs = [], [], [], []
    for language in ("en", "zh"):
        found = [chat(record, language) for record in read(data / "sft" / f"alpaca_{language}.json")]
        found = [record for record in found if record]
        chats += found[: len(found) * 9 // 10]
        held_out_chats += found[len(found) * 9 // 10 :]
        found = [pair(record, language) for record in read(data / "preference" / f"dpo_{language}.json")]
        found = [record for record in found if record]
        pairs += found[: len(found) * 2 // 3]
        held_out_pairs += found[len(found) * 2 // 3 :]
    numbers.shuffle(chats)
    numbers.shuffle(pairs)
    judged = [
        {"prompt": record["prompt"], "completion": record[name], "label": name == "chosen"}
        for record in pairs
        for name in ("chosen", "rejected")
    ]
    numbers.shuffle(judged)
    write(output / "sft.jsonl", chats)
    write(output / "prompts.jsonl", ({"prompt": record["prompt"]} for record in chats))
    write(output / "held_out_sft.jsonl", held_out_chats)
    write(output / "pairs.jsonl", pairs)
    write(output / "judged.jsonl", judged)
    write(output / "held_out_pairs.jsonl", held_out_pairs)
    poems = [json.loads(line) for line in (data / "text" / "tang_poems_zh.jsonl").read_text("utf-8").splitlines()]
    write(output / "poems.jsonl", ({"text": poem["text"]} for poem in poems[:2000]))
    write(output / "answers.jsonl", ({"text": record["completion"]} for record in chats))


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def chat(record: dict[str, str], language: str) -> dict[str, Any] | None:
    """A prompt and the beginning of its answer; None if the prompt is long."""
    prompt = "\n".join(filter(None, (record["instruction"], record["input"])))
    if len(prompt) > LONGEST_PROMPT[language]:
        return None
    message = {"role": "user", "content": prompt}
    return {"prompt": [message], "completion": record["output"][: LONGEST_ANSWER[language]]}


def pair(record: dict[str, Any], language: str) -> dict[str, Any] | None:
    """A prompt and the beginnings of both answers; None if the prompt is long, or these are equal."""
    prompt = [{"role": NAMES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    answers = {name: record[name]["value"][: LONGEST_ANSWER[language]] for name in ("chosen", "rejected")}
    if sum(len(turn["content"]) for turn in prompt) > LONGEST_PROMPT[language]:
        return None
    if answers["chosen"] == answers["rejected"]:
        return None
    return {"prompt": prompt, **answers}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
