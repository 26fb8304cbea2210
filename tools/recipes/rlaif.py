"""Run RLAIF: a judge that is a model of ours compares answers in both orders, and DPO learns what it prefers.

    python tools/recipes/rlaif.py runs/rlaif

The policy adds numbers below 20 (`sums.py`). The judge is trained on verdicts about pairs of sums, among which are none
of the held-out ones. Prints the judge's accuracy, what `maxlm feedback` counted, and the policy's accuracy before and
after, with 95 % intervals.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from stages import maxlm, print_table, read, shown, write
from sums import accuracy, prepare

from maxlm.core.interval import mean_interval
from maxlm.runtime.manifest import read_manifest

CONFIGS = Path(__file__).parents[2] / "configs" / "recipes" / "rlaif"
VERDICTS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/rlaif"))
    out = parser.parse_args().output
    data = out / "data"
    prepare(out)
    write_verdicts(data / "prompts.jsonl", out / "verdicts.jsonl", VERDICTS)
    write_verdicts(data / "valid.jsonl", out / "verdicts.valid.jsonl", 500)
    names = [f"output={out}/judge", f"init_from={out}/pretrain", f"objective.train_file={out}/verdicts.jsonl"]
    maxlm("train", f"{CONFIGS}/judge.yaml", *names)
    names = [f"output={out}/preferences", f"records={data}/prompts.jsonl", f"model.path={out}/sft"]
    constitution = f"constitution={CONFIGS}/constitution.yaml"
    maxlm("feedback", f"{CONFIGS}/prefer.yaml", *names, f"judge.path={out}/judge", constitution)
    pairs = f"objective.train_file={out}/preferences/preferences.jsonl"
    maxlm("train", f"{CONFIGS}/dpo.yaml", f"output={out}/dpo", f"init_from={out}/sft", pairs)

    print(
        f"The judge is right about pairs of held-out sums: {accuracy(out / 'judge', out / 'verdicts.valid.jsonl', 0)}"
    )
    print(f"Pairs that it prefers rightly: {right_pairs(data / 'prompts.jsonl', out / 'preferences')}")
    print(f"maxlm feedback: {json.dumps(read_manifest(out / 'preferences')['metrics'])}\n")
    files = {"training sums, sampled": ("prompts", 1.0), "held-out sums, greedy": ("valid", 0.0)}
    rows = [
        (title, *(accuracy(out / model, data / f"{file}.jsonl", temperature) for model in ("sft", "dpo")))
        for title, (file, temperature) in files.items()
    ]
    print_table(("accuracy", "SFT", "DPO"), rows)


def write_verdicts(prompts: Path, file: Path, number: int) -> None:
    """Pairs of answers to sums, one of which is right, in the form of the constitution's prompt, with the verdict."""
    numbers, records, chats = random.Random(3), read(prompts), []
    for _ in range(number):
        record = numbers.choice(records)
        wrong = numbers.choice([str(answer) for answer in range(20) if str(answer) != record["answer"]])
        answers = [record["answer"], wrong]
        numbers.shuffle(answers)
        question = " ".join(f"{record['prompt']}{answer}" for answer in answers)
        verdict = f"Verdict: {'AB'[answers.index(record['answer'])]}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": verdict}]
        chats.append({"messages": messages})
    write(file, chats)


def right_pairs(prompts: Path, preferences: Path) -> str:
    """Of the pairs with one right answer, the share in which it is the preferred one."""
    answers = {record["prompt"]: record["answer"] for record in read(prompts)}
    right = []
    for pair in read(preferences / "preferences.jsonl"):
        good = [pair[name].strip() == answers[pair["prompt"]] for name in ("chosen", "rejected")]
        if good[0] != good[1]:
            right.append(good[0])
    return f"{shown(mean_interval(np.array(right, np.float64)).to_dict())} of {len(right)}"


if __name__ == "__main__":
    main()
