"""Train a small chat model in English and Chinese: SFT, DPO, KTO, a reward model with PPO, QLoRA, P-tuning v2.

    python tools/recipes/chat.py DATA runs/chat

DATA is a folder of small public data sets (`make_chat.py`). Each stage is a `maxlm` command with a file of
configs/recipes/chat, which the output shows; finished stages are kept. Prints what each stage changed on held-out
records, with 95 % intervals over them; docs/recipes.md explains the measures.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from stages import maxlm, print_table, shown

from maxlm.core.interval import mean_interval

TOOLS = Path(__file__).parent
CONFIGS = TOOLS.parents[1] / "configs" / "recipes" / "chat"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of public data sets")
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/chat"))
    arguments = parser.parse_args()
    out = arguments.output
    make = [sys.executable, str(TOOLS / "make_chat.py"), str(arguments.data), str(out / "data")]
    subprocess.run(make, check=True)
    pretrain(arguments.data, out)

    def train(name: str, start: str, file: str, *options: str, run: str = "") -> None:
        names = [
            f"output={out}/{run or name}",
            f"init_from={out}/{start}",
            f"objective.train_file={out}/data/{file}.jsonl",
        ]
        maxlm("train", f"{CONFIGS}/{name}.yaml", *names, *options)

    train("sft", "pretrain", "sft")
    # As a published model comes.
    once(out / "huggingface", "export", f"{out}/pretrain", f"{out}/huggingface", "--format", "hf")
    once(out / "base", "import", "hf", f"{out}/huggingface", f"{out}/base")
    for name in ("qlora", "prefix"):
        train(name, "base", "sft")
    train("dpo", "sft", "pairs")
    train("kto", "sft", "judged")
    train("reward", "sft", "pairs")
    # Judges what PPO learned from the other one.
    train("reward", "sft", "pairs", "seed=1", run="another_reward")
    reward = [f"objective.reward=[{{model: {out}/reward}}]", f"objective.critic.start={out}/reward"]
    train("ppo", "sft", "prompts", *reward)

    print_table(
        ("recipe", "measure", "before", "after", "difference"),
        [
            ("SFT", "right answer of four", *compared(out, "pretrain", "sft", "which_answer")),
            ("QLoRA of an imported model", "right answer of four", *compared(out, "base", "qlora", "which_answer")),
            ("P-tuning v2 of the same", "right answer of four", *compared(out, "base", "prefix", "which_answer")),
            ("DPO", "preferred answer of two", *compared(out, "sft", "dpo", "which_is_better")),
            ("KTO", "preferred answer of two", *compared(out, "sft", "kto", "which_is_better")),
            ("reward model", "preferred answer of two", "50.0%", preferred(out, "reward"), ""),
            ("PPO", "its reward", *rewarded(out, "reward")),
            ("PPO", "another reward model", *rewarded(out, "another_reward")),
        ],
    )


def once(result: Path, *arguments: str) -> None:
    """Run a `maxlm` command unless its result is there."""
    if not result.exists():
        maxlm(*arguments)


def pretrain(data: Path, out: Path) -> None:
    texts = [f"{{uri: {data}/text/{name}, document_per_line: true}}" for name in ("wiki_en.txt", "medical_zh.txt")]
    files = [data / "text" / "c4_en.jsonl", out / "data" / "poems.jsonl", out / "data" / "answers.jsonl"]
    sources = f"sources=[{', '.join([*texts, *(f'{{uri: {file}}}' for file in files)])}]"
    build = ["data", "build", f"{CONFIGS}/data.yaml", f"output={out}/rows", f"tokenizer={out}/tokenizer", sources]
    once(out / "rows" / "documents", *build, "--stop-after", "documents")
    names = [f"input={out}/rows", f"output={out}/tokenizer"]
    once(out / "tokenizer" / "manifest.json", "tokenizer", "train", f"{CONFIGS}/tokenizer.yaml", *names)
    once(out / "rows" / "manifest.json", *build)
    maxlm("train", f"{CONFIGS}/pretrain.yaml", f"output={out}/pretrain", f"objective.sources=[{{path: {out}/rows}}]")


def compared(out: Path, before: str, after: str, task: str) -> tuple[str, str, str]:
    """Accuracies of two models on a task, and their difference."""
    options = ["--task", f"{out}/data/{task}.jsonl", "--no-baselines", "--output"]
    right = []
    for name in (before, after):
        file = out / f"{name}.{task}.json"
        once(file, "eval", f"{out}/{name}", *options, str(file))
        found = json.loads(file.read_text())["tasks"][0]
        right.append(np.array([example["correct"] for example in found["examples"]], np.float64))
    accuracies = [shown(mean_interval(each).to_dict()) for each in right]
    return *accuracies, shown(mean_interval(right[1] - right[0]).to_dict())


def preferred(out: Path, model: str) -> str:
    """How often a reward model prefers the chosen answer of a held-out pair."""
    scores = scored(out, model, out / "data" / "held_out_pairs.jsonl", f"{model}.pairs")
    return shown(
        mean_interval(
            np.array([line["chosen_score"] > line["rejected_score"] for line in scores], np.float64)
        ).to_dict()
    )


def rewarded(out: Path, model: str) -> tuple[str, str, str]:
    """What a reward model gives to answers of SFT and PPO to held-out prompts, and the difference."""
    scores = []
    for name in ("sft", "ppo"):
        file = out / f"answers_{name}" / "chats.jsonl"
        names = [f"output={file.parent}", f"records={out}/data/new_prompts.jsonl", f"model.path={out}/{name}"]
        options = ["answers={count: 1, max_tokens: 64, temperature: 1.0}"]
        once(file, "feedback", "feedback/answer", *names, *options)
        scores.append(np.array([line["score"] for line in scored(out, model, file, f"{model}.{name}")]))
    return tuple(mean_interval(each).format(2) for each in (*scores, scores[1] - scores[0]))


def scored(out: Path, model: str, file: Path, name: str) -> list[dict]:
    result = out / f"{name}.jsonl"
    once(result, "score", f"{out}/{model}", str(file), "--output", str(result))
    return [json.loads(line) for line in result.read_text().splitlines()]


if __name__ == "__main__":
    main()
