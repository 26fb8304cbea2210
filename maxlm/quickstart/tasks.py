"""Input files of SFT, alignment and evaluation: chats, prompts with verifiable answers, held-out questions."""

import json
import platform
import random
from pathlib import Path

from maxlm.quickstart.questions import Question, is_held_out, questions_about, read_functions
from maxlm.runtime.manifest import write_manifest

HELD_OUT_FRACTION = 0.15
ALIGNMENT_FRACTION = 0.3  # of the functions not held out
CHATS_OF_A_FUNCTION = 2
SEED = 0


def write_tasks(folder: Path) -> dict:
    """Write sft_{train,valid}.jsonl, prompts.jsonl and questions.jsonl; return the manifest.

    Alignment asks about functions that SFT has not seen, so that memorization earns no reward.
    Evaluation questions are about functions that no stage has seen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    functions = read_functions()
    rng = random.Random(SEED)
    held_out = [is_held_out(function, HELD_OUT_FRACTION) for function in functions]
    unseen = [function for function, out in zip(functions, held_out) if out]
    seen = [function for function, out in zip(functions, held_out) if not out]
    rng.shuffle(seen)
    num_alignment = round(ALIGNMENT_FRACTION * len(seen))
    for_alignment, for_sft = seen[:num_alignment], seen[num_alignment:]

    chats = [_chat(questions_about(function, rng)) for function in for_sft for _ in range(CHATS_OF_A_FUNCTION)]
    prompts = [question for function in for_alignment for question in questions_about(function, rng)]
    questions = [question for function in unseen for question in questions_about(function, rng)]
    valid = [_chat(questions_about(function, rng)) for function in unseen]
    for items in (chats, prompts, questions, valid):
        rng.shuffle(items)
    files = {
        "sft_train": chats,
        "sft_valid": valid,
        "prompts": [_task(question) for question in prompts],
        "questions": [_task(question) for question in questions],
    }
    counts = {name: _write(folder / f"{name}.jsonl", records) for name, records in files.items()}
    return write_manifest(
        folder,
        stage="tasks",
        inputs={},
        config=settings(),
        metrics={"functions": len(functions), **counts},
    )


def settings() -> dict:
    """Settings that the files depend on; the Python version determines the library."""
    return {"held_out_fraction": HELD_OUT_FRACTION, "seed": SEED, "python": platform.python_version()}


def _chat(questions: list[Question]) -> dict:
    """All questions about one function as one chat: more answers per chat to learn from."""
    turns = [({"role": "user", "content": q.prompt}, {"role": "assistant", "content": q.answer}) for q in questions]
    return {"messages": [message for turn in turns for message in turn]}


def _task(question: Question) -> dict:
    messages = [{"role": "user", "content": question.prompt}]
    return {"prompt": messages, "answer": question.answer, "kind": question.kind}


def _write(path: Path, records: list[dict]) -> int:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return len(records)
