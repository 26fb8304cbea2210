"""Run the recipe of sums below 20: SFT to a third, then GRPO with several seeds, and PPO.

    python tools/recipes/sums.py runs/sums --seeds 3

Each stage is a `maxlm` command with a file of configs/recipes/sums, which the output shows; finished stages are kept.
Prints the accuracy of sampled answers to the training prompts and of greedy answers to held-out sums, before and after,
with 95 % intervals over the sums, and the step at which the mean reward of 10 steps first reached 0.9.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from stages import maxlm, once, print_table, read, shown

CONFIGS = Path(__file__).parents[2] / "configs" / "recipes" / "sums"


def prepare(out: Path) -> None:
    """Make the data, and in `out`/sft the model that has a third of the sums right."""
    data = out / "data"
    subprocess.run([sys.executable, str(Path(__file__).parent / "make_sums.py"), str(data)], check=True)
    names = [f"input={data}/text.txt", f"output={out}/tokenizer"]
    once(out / "tokenizer", "tokenizer", "train", str(CONFIGS / "tokenizer.yaml"), *names)
    source = f"sources=[{{uri: {data}/text.txt, document_per_line: true}}]"
    names = [f"output={out}/rows", f"tokenizer={out}/tokenizer", source]
    once(out / "rows" / "manifest.json", "data", "build", str(CONFIGS / "data.yaml"), *names)
    source = f"objective.sources=[{{path: {out}/rows}}]"
    maxlm("train", str(CONFIGS / "pretrain.yaml"), f"output={out}/pretrain", source)
    files = [f"objective.train_file={data}/sft.jsonl", f"init_from={out}/pretrain"]
    maxlm("train", str(CONFIGS / "sft.yaml"), f"output={out}/sft", *files)


def accuracy(model: Path, task: Path, temperature: float, *, tokens: int = 4) -> str:
    options = ["--temperature", str(temperature), "--max-new-tokens", str(tokens), "--no-baselines", "--json"]
    found = json.loads(maxlm("eval", str(model), "--task", str(task), *options))["tasks"][0]["accuracy"]
    return shown(found)


def first_step_at(run: Path, reward: float) -> str:
    records = read(run / "metrics.jsonl")
    steps = [record["step"] for record in records if record.get("reward", 0.0) >= reward]
    return str(steps[0]) if steps else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/sums"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    out = arguments.output
    data = out / "data"
    prepare(out)
    rows = [
        ("sft", "-", accuracy(out / "sft", data / "prompts.jsonl", 1.0), accuracy(out / "sft", data / "valid.jsonl", 0))
    ]
    files = [f"objective.{name}_file={data}/{file}.jsonl" for name, file in (("train", "prompts"), ("valid", "valid"))]
    for method in ("grpo", "ppo"):
        for seed in range(arguments.seeds):
            run = out / f"{method}-{seed}"
            options = [f"output={run}", f"init_from={out}/sft", f"seed={seed}", *files]
            maxlm("train", str(CONFIGS / f"{method}.yaml"), *options)
            sampled = accuracy(run, data / "prompts.jsonl", 1.0)
            rows.append((run.name, first_step_at(run, 0.9), sampled, accuracy(run, data / "valid.jsonl", 0)))
    print_table(("run", "first step at reward 0.9", "sampled, training sums", "greedy, held-out sums"), rows)


if __name__ == "__main__":
    main()
