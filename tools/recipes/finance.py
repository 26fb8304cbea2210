"""Run the finance recipe: a base model, its prompt, QLoRA, P-tuning v2, and QLoRA on data that the model built itself.

    python tools/recipes/finance.py runs/finance

Each stage is a `maxlm` command with a file of configs/recipes/finance, or a Python file of this folder, which the
output shows; finished stages are kept. Prints the share of held-out questions with the right number, the right
citations and both, with 95 % intervals over the questions, and the share with both by kind of question.
docs/finance.md explains it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from finance_reports import KINDS
from finance_rules import right_citations, right_number
from stages import maxlm, print_table, read, shown

from maxlm.config.load import load_config
from maxlm.core.interval import proportion_interval

TOOLS = Path(__file__).parent
CONFIGS = TOOLS.parents[1] / "configs" / "recipes" / "finance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/finance"))
    out = parser.parse_args().output
    data = out / "data"

    once(data / "held_out.jsonl", lambda: python("make_finance.py", data))
    sources = f"sources=[{{uri: {data}/text.jsonl}}]"
    build = ["data", "build", f"{CONFIGS}/data.yaml", f"output={out}/rows", f"tokenizer={out}/tokenizer", sources]
    once(out / "rows" / "documents", lambda: maxlm(*build, "--stop-after", "documents"))
    names = [f"input={out}/rows", f"output={out}/tokenizer"]
    once(out / "tokenizer" / "manifest.json", lambda: maxlm("tokenizer", "train", f"{CONFIGS}/tokenizer.yaml", *names))
    once(out / "rows" / "manifest.json", lambda: maxlm(*build))
    train("pretrain", f"output={out}/pretrain", f"objective.sources=[{{path: {out}/rows}}]")
    chats = f"objective.train_file={data}/chats.jsonl"
    train("instruct", f"output={out}/instruct", f"init_from={out}/pretrain", chats)
    # As a published model comes.
    once(out / "huggingface", lambda: maxlm("export", f"{out}/instruct", f"{out}/huggingface", "--format", "hf"))
    once(out / "base", lambda: maxlm("import", "hf", f"{out}/huggingface", f"{out}/base"))

    task(out, f"{CONFIGS}/few_shot.yaml", f"examples.file={data}/examples.jsonl", name="few_shot")
    task(out, f"{CONFIGS}/chat.yaml", name="chat")
    start = f"init_from={out}/base"
    annotated, built = (f"objective.train_file={data}/{name}.jsonl" for name in ("annotated", "built"))
    train("qlora", f"output={out}/qlora", start, annotated)
    train("prefix", f"output={out}/prefix", start, annotated)
    asked = [f"output={out}/answers", f"records={data}/new.jsonl", f"model.path={out}/qlora"]
    maxlm("feedback", f"{CONFIGS}/answer.yaml", *asked)
    once(data / "built.jsonl", lambda: python("finance_filter.py", data, out / "answers"))
    # As many passes over the larger file.
    growth = len(read(data / "built.jsonl")) / len(read(data / "annotated.jsonl"))
    steps = round(growth * load_config(f"{CONFIGS}/qlora.yaml", kind="train").steps)
    train("qlora", f"output={out}/qlora-built", start, built, f"steps={steps}")

    models = (
        ("prompt alone, no examples", "base", "chat"),
        ("prompt alone, 2 examples", "base", "few_shot"),
        ("P-tuning v2", "prefix", "chat"),
        ("QLoRA", "qlora", "chat"),
        ("QLoRA, after the data-set builder", "qlora-built", "chat"),
    )
    rows, by_kind = [], []
    for title, model, prompts in models:
        number, citations, kinds = evaluate(out, model, prompts)
        both = number & citations
        rows.append((title, *(with_interval(right) for right in (number, citations, both))))
        by_kind.append((title, *(f"{both[kinds == kind].mean():.0%}" for kind in KINDS)))
    print_table(("model", "number right", "citations right", "both"), rows)
    print()
    print_table(("both, by kind", *KINDS), by_kind)


def once(result: Path, stage: Callable[[], object]) -> None:
    """Run a stage unless its result is there."""
    if not result.exists():
        stage()


def python(name: str, *arguments: Path) -> None:
    """Run a Python file of this folder."""
    print("python", f"tools/recipes/{name}", *arguments, file=sys.stderr)
    subprocess.run([sys.executable, str(TOOLS / name), *map(str, arguments)], check=True)


def train(name: str, *options: str) -> None:
    """Train; a finished run is kept, and an interrupted one goes on."""
    maxlm("train", f"{CONFIGS}/{name}.yaml", *options)


def task(out: Path, config: str, *options: str, name: str) -> None:
    """Build the prompts of the held-out questions."""
    file = out / "data" / f"{name}.task.jsonl"
    names = ["--data", f"{out}/data/held_out.jsonl", "--output", str(file)]
    once(file, lambda: maxlm("prompt", "build", config, *options, *names))


def evaluate(out: Path, model: str, prompts: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each held-out question: whether the number and the citations of the greedy answer are right, and its kind."""
    file = out / f"{model}.{prompts}.json"
    options = ["--task", f"{out}/data/{prompts}.task.jsonl", "--no-baselines", "--max-new-tokens", "64"]
    once(file, lambda: maxlm("eval", f"{out}/{model}", *options, "--stop", "\n", "--output", str(file)))
    records = read(out / "data" / "held_out.jsonl")
    outputs = [example["output"] for example in json.loads(file.read_text())["tasks"][0]["examples"]]
    right = [
        np.array([rule(None, [text], record)[0] == 1.0 for text, record in zip(outputs, records, strict=True)])
        for rule in (right_number, right_citations)
    ]
    return right[0], right[1], np.array([record["kind"] for record in records])


def with_interval(right: np.ndarray) -> str:
    return shown(proportion_interval(right.astype(np.int64)).to_dict())


if __name__ == "__main__":
    main()
