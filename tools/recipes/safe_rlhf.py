"""Run Safe RLHF: reward and cost model from pairs, PPO without and with a constraint on the cost.

    python tools/recipes/safe_rlhf.py runs/safe_rlhf

The model adds numbers below 20 (`sums.py`), and learns that an answer may end in an exclamation mark. Such an answer
shouts, which here is harm. The pairs of answers have the form of PKU-SafeRLHF, and their two judgments conflict: the
right answer is better, and of two right or two wrong ones the one that shouts; but the one that does not is safer.
PPO starts twice from the same model and with the same rewards, without and with the constraint. Prints for each model
the share of sampled answers that shout, by the rule and not by the cost model, the share of right ones, and the mean
scores of both models, with 95 % intervals over the sums; and the accuracy of both models on pairs of held-out sums.
"""

import argparse
import json
import random
from itertools import groupby
from pathlib import Path

import numpy as np
from stages import maxlm, once, print_table, read, shown, write
from sums import prepare

from maxlm.core.interval import mean_interval, proportion_interval
from maxlm.runtime.manifest import read_manifest

CONFIGS = Path(__file__).parents[2] / "configs" / "recipes" / "safe_rlhf"
FILES = {"training sums": "prompts", "held-out sums": "valid"}
MODELS = {"SFT": "start", "PPO": "unconstrained", "PPO, constrained": "constrained"}
PAIRS, HELD_OUT_PAIRS = 10_000, 1000
SAMPLES = 8  # of each model to each sum, for the measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/safe_rlhf"))
    out = parser.parse_args().output
    prepare(out)
    write_data(out / "data", out)
    names = [f"output={out}/start", f"init_from={out}/sft", f"objective.train_file={out}/answers.jsonl"]
    maxlm("train", f"{CONFIGS}/sft.yaml", *names)
    files = [f"objective.train_file={out}/pairs.jsonl", f"objective.valid_file={out}/pairs.valid.jsonl"]
    for name in ("reward", "cost"):
        maxlm("train", f"{CONFIGS}/{name}.yaml", f"output={out}/{name}", f"init_from={out}/start", *files)
    names = [f"init_from={out}/start", f"objective.train_file={out}/data/prompts.jsonl"]
    names.append(f"objective.reward.0.model={out}/reward")
    constraints = {"unconstrained": "constraint=null", "constrained": f"constraint.cost.0.model={out}/cost"}
    for name, constraint in constraints.items():
        maxlm("train", f"{CONFIGS}/ppo.yaml", f"output={out}/{name}", *names, f"objective.{constraint}")

    conflicts = [pair["better_response_id"] != pair["safer_response_id"] for pair in read(out / "pairs.jsonl")]
    print(f"Pairs whose better answer is not the safer one: {np.mean(conflicts):.1%} of {len(conflicts)}")
    reward, cost = (read_manifest(out / name)["metrics"]["valid"] for name in ("reward", "cost"))
    print(f"Of {HELD_OUT_PAIRS} pairs of held-out sums, the reward model ranks {reward['accuracy']:.1%} rightly,")
    print(f"the cost model {cost['accuracy']:.1%}; the sign of its cost is right for {cost['sign_accuracy']:.1%}.")
    multipliers = [control["multiplier"] for control in read(out / "constrained" / "controls.jsonl")]
    print(f"Multiplier: {multipliers[0]:.2f} after the first round, {multipliers[-1]:.2f} after the last")
    print_table(("sampled answers", "harm", "right", "mean reward", "mean cost"), measurements(out))


def is_harmful(answer: str) -> bool:
    return answer.strip().endswith("!")


def is_right(answer: str, right: str) -> bool:
    return answer.strip().removesuffix("!") == right


def write_data(sums: Path, folder: Path) -> None:
    """Write what SFT and the pairs learn from, and the tasks, which ask for each sum `SAMPLES` times."""
    prompts, valid = (read(sums / f"{name}.jsonl") for name in ("prompts", "valid"))
    answers = [
        {"prompt": item["prompt"], "completion": item["answer"] + mark} for item in prompts for mark in ("", "!")
    ]
    write(folder / "answers.jsonl", answers)
    write(folder / "pairs.jsonl", make_pairs(prompts, PAIRS, random.Random(0)))
    write(folder / "pairs.valid.jsonl", make_pairs(valid, HELD_OUT_PAIRS, random.Random(1)))
    for name, records in (("prompts", prompts), ("valid", valid)):
        write(folder / f"task.{name}.jsonl", [record for record in records for _ in range(SAMPLES)])


def make_pairs(records: list[dict], number: int, numbers: random.Random) -> list[dict]:
    """Pairs in the form of PKU-SafeRLHF; the two answers differ in being right, in being harmful, or in both."""
    pairs = []
    while len(pairs) < number:
        record = numbers.choice(records)
        right = record["answer"]
        near, far = abs(int(right) + numbers.choice((-3, -2, -1, 1, 2, 3))), numbers.randrange(1000)
        wrong = str(numbers.choice((near, far)))
        answers = [numbers.choice((right, wrong)) + numbers.choice(("", "!")) for _ in range(2)]
        if answers[0] != answers[1]:
            pairs.append(judged(record["prompt"], answers, right))
    return pairs


def judged(prompt: str, answers: list[str], right: str) -> dict:
    """A pair with its labels."""
    harmful, good = [is_harmful(answer) for answer in answers], [is_right(answer, right) for answer in answers]
    return {
        "prompt": prompt,
        "response_0": answers[0],
        "response_1": answers[1],
        "is_response_0_safe": not harmful[0],
        "is_response_1_safe": not harmful[1],
        "better_response_id": max((0, 1), key=lambda index: (good[index], harmful[index])),
        "safer_response_id": max((0, 1), key=lambda index: (not harmful[index], good[index])),
    }


def sampled(out: Path, model: str) -> dict[str, list[list[str]]]:
    """By file, `SAMPLES` answers of a model to each sum."""
    result = out / f"{model}.samples.json"
    tasks = [word for file in FILES.values() for word in ("--task", f"{out}/task.{file}.jsonl")]
    options = ["--temperature", "1.0", "--max-new-tokens", "5", "--no-baselines", "--output", str(result)]
    once(result, "eval", f"{out}/{model}", *tasks, *options)
    found = {}
    for file, task in zip(FILES.values(), json.loads(result.read_text())["tasks"], strict=True):
        outputs = [example["output"] for example in task["examples"]]
        found[file] = [outputs[start : start + SAMPLES] for start in range(0, len(outputs), SAMPLES)]
    return found


def measurements(out: Path) -> list[tuple[str, ...]]:
    """For each set of sums and each model: shares of harmful and right answers, and mean scores."""
    records = []
    for sums, file in FILES.items():
        for title, model in MODELS.items():
            samples = zip(read(out / "data" / f"{file}.jsonl"), sampled(out, model)[file], strict=True)
            for record, answers in samples:
                # `maxlm score` refuses empty answers.
                scored = [answer for answer in answers if answer.strip()]
                records.append({**record, "row": f"{title}, {sums}", "answers": answers, "completions": scored})
    write(out / "sampled.jsonl", records)
    for name in ("reward", "cost"):
        file = out / f"sampled.{name}.jsonl"
        once(file, "score", f"{out}/{name}", f"{out}/sampled.jsonl", "--output", str(file))
        for record, line in zip(records, read(file), strict=True):
            record[name] = np.mean([answer["score"] for answer in line["completions"]])
    return [row(title, list(of_row)) for title, of_row in groupby(records, key=lambda record: record["row"])]


def row(title: str, records: list[dict]) -> tuple[str, ...]:
    """A line of the table. The units of the intervals are sums, since answers to one sum are alike."""
    harm = [np.mean([is_harmful(answer) for answer in item["answers"]]) for item in records]
    right = [np.mean([is_right(answer, item["answer"]) for answer in item["answers"]]) for item in records]
    # Where all answers are harmless, or all right, this is Wilson's interval.
    shares = [shown(proportion_interval(np.array(values)).to_dict()) for values in (harm, right)]
    means = [mean_interval(np.array([item[name] for item in records])).format(2) for name in ("reward", "cost")]
    return title, *shares, *means


if __name__ == "__main__":
    main()
