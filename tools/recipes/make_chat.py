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

# Characters of the beginnings of answers that are compared by their likelihood, so that all are about as long.
BEGINNING = 100
# Characters of answers that are learned from, and of prompts at most.
LEARNED = {"en": 500, "zh": 200}
LONGEST_PROMPT = {"en": 400, "zh": 150}
NAMES = {"system": "system", "human": "user", "gpt": "assistant"}


def main(data: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(0)
    chats, asked, pairs, compared = [], [], [], []
    for language in ("en", "zh"):
        found = [chat(record, language) for record in read(data / "sft" / f"alpaca_{language}.json")]
        found = [record for record in found if record and len(record["completion"]) > BEGINNING / 2]
        chats += found[: len(found) * 9 // 10]
        asked.append((language, found[len(found) * 9 // 10 :]))
        found = [pair(record, language) for record in read(data / "preference" / f"dpo_{language}.json")]
        found = [record for record in found if record]
        pairs += found[: len(found) * 2 // 3]
        compared.append((language, found[len(found) * 2 // 3 :]))
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
    write(output / "new_prompts.jsonl", ({"prompt": record["prompt"]} for _, found in asked for record in found))
    write(output / "pairs.jsonl", pairs)
    write(output / "judged.jsonl", judged)
    write(output / "held_out_pairs.jsonl", (record for _, found in compared for record in found))
    write(output / "which_answer.jsonl", (task for each in asked for task in which_answer(*each, numbers)))
    write(output / "which_is_better.jsonl", (task for each in compared for task in which_is_better(*each, numbers)))
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
    return {"prompt": [message], "completion": record["output"][: LEARNED[language]]}


def pair(record: dict[str, Any], language: str) -> dict[str, Any] | None:
    """A prompt and the beginnings of both answers; None if the prompt is long, or these are equal."""
    prompt = [{"role": NAMES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    answers = {name: record[name]["value"][: LEARNED[language]] for name in ("chosen", "rejected")}
    if sum(len(turn["content"]) for turn in prompt) > LONGEST_PROMPT[language]:
        return None
    if answers["chosen"][:BEGINNING] == answers["rejected"][:BEGINNING]:
        return None
    return {"prompt": prompt, **answers}


def which_answer(language: str, chats: list[dict[str, Any]], numbers: random.Random) -> Iterable[dict[str, Any]]:
    """Which of four answers belongs to a prompt? The others are those to other prompts."""
    for record in chats:
        others = numbers.sample([other for other in chats if other is not record], 3)
        yield task(language, record["prompt"], [each["completion"] for each in (record, *others)], numbers)


def which_is_better(language: str, pairs: list[dict[str, Any]], numbers: random.Random) -> Iterable[dict[str, Any]]:
    """Which of two answers did people prefer?"""
    for record in pairs:
        yield task(language, record["prompt"], [record["chosen"], record["rejected"]], numbers)


def task(language: str, prompt: list[dict[str, str]], answers: list[str], numbers: random.Random) -> dict[str, Any]:
    """A question of `maxlm eval` whose right choice is the first answer, in random order."""
    right = numbers.randrange(len(answers))
    choices = [text[:BEGINNING] for text in answers]
    choices[0], choices[right] = choices[right], choices[0]
    return {"messages": prompt, "choices": choices, "answer": right, "kind": language}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
