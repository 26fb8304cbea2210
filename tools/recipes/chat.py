"""Train a small chat model in English and Chinese: SFT, DPO, KTO, a reward model with PPO, QLoRA, P-tuning v2.

    python tools/recipes/chat.py DATA runs/chat

DATA is a folder of small public data sets (`make_chat.py`). Each stage is a `maxlm` command with a file of
configs/recipes/chat, which the output shows; finished stages are kept. Prints what each stage changed on held-out
records, with 95 % intervals over them; docs/recipes.md explains the measures.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from stages import maxlm, once, print_table, read, shown, write

from maxlm import load
from maxlm.core.interval import mean_interval, ratio_interval

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
        ("recipe", "measure on held-out records", "before", "after", "difference"),
        [
            ("SFT", "bits per byte of answers", *likelihood(out, "pretrain", "sft")),
            ("QLoRA of an imported model", "the same", *likelihood(out, "base", "qlora")),
            ("P-tuning v2 of it", "the same", *likelihood(out, "base", "prefix")),
            ("DPO", "pairs preferred as people do", "", preferred(out, "dpo"), ""),
            ("KTO", "the same", "", preferred(out, "kto"), ""),
            ("reward model", "pairs scored as people do", "", ranked(out, "reward"), ""),
            ("PPO", "score of its reward model", *rewarded(out, "reward")),
            ("PPO", "score of another one", *rewarded(out, "another_reward")),
        ],
    )


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


def log_probabilities(out: Path, model: str, records: list[dict[str, Any]], answer: str) -> np.ndarray:
    """Of each record's answer: [n], in nats."""
    scores = load(out / model).score([each["prompt"] for each in records], [each[answer] for each in records])
    return np.array([score.log_probability for score in scores])


def likelihood(out: Path, before: str, after: str) -> tuple[str, str, str]:
    """Bits per byte of the answers to held-out prompts under two models, and their difference."""
    records = read(out / "data" / "held_out_sft.jsonl")
    num_bytes = np.array([len(record["completion"].encode()) for record in records])
    bits = [-log_probabilities(out, model, records, "completion") / math.log(2) for model in (before, after)]
    first, second, difference = (ratio_interval(each, num_bytes).format(2) for each in (*bits, bits[1] - bits[0]))
    return first, second, difference


def preferred(out: Path, model: str) -> str:
    """In how many held-out pairs the chosen answer gained more likelihood over the SFT model than the rejected one."""
    records = read(out / "data" / "held_out_pairs.jsonl")
    gains = {
        name: log_probabilities(out, model, records, name) - log_probabilities(out, "sft", records, name)
        for name in ("chosen", "rejected")
    }
    return shown(mean_interval((gains["chosen"] > gains["rejected"]).astype(np.float64)).to_dict())


def ranked(out: Path, model: str) -> str:
    """In how many held-out pairs a reward model scores the chosen answer higher."""
    scores = scored(out, model, out / "data" / "held_out_pairs.jsonl", f"{model}.pairs")
    better = [line["chosen_score"] > line["rejected_score"] for line in scores]
    return shown(mean_interval(np.array(better, np.float64)).to_dict())


def rewarded(out: Path, model: str) -> tuple[str, str, str]:
    """What a reward model gives to answers of SFT and PPO to held-out prompts, and the difference."""
    scores = []
    for name in ("sft", "ppo"):
        file = out / f"{name}.answers.jsonl"
        if not file.exists():
            write_answers(out / name, out / "data" / "held_out_sft.jsonl", file)
        scores.append(np.array([line["score"] for line in scored(out, model, file, f"{model}.{name}")]))
    before, after, difference = (mean_interval(each).format(2) for each in (*scores, scores[1] - scores[0]))
    return before, after, difference


def write_answers(model: Path, prompts: Path, file: Path) -> None:
    """Sample an answer to each prompt; those that are cut off count too, as in training."""
    asked = [record["prompt"] for record in read(prompts)]
    texts = load(model).generate(asked, max_new_tokens=64, temperature=1.0, seed=0)
    records = ({"prompt": prompt, "completion": text or " "} for prompt, text in zip(asked, texts))
    write(file, records)


def scored(out: Path, model: str, file: Path, name: str) -> list[dict[str, Any]]:
    """The scores of the answers of a file under a reward model."""
    result = out / f"{name}.jsonl"
    once(result, "score", f"{out}/{model}", str(file), "--output", str(result))
    return read(result)


if __name__ == "__main__":
    main()
