"""Run the recipe of word problems in GSM8K's format: SFT on a part of the solutions, then GRPO with several seeds.

    python tools/recipes/word_problems.py runs/word_problems --seeds 2
    python tools/recipes/word_problems.py runs/gsm8k --train TRAIN.jsonl --test TEST.jsonl

Each stage is a `maxlm` command with a file of configs/recipes/word_problems, which the output shows; finished stages
are kept. Without files of `question` and `answer`, make_word_problems.py writes them. Prints the accuracy of greedy and
of sampled answers to held-out questions, before and after, with 95 % intervals over the questions, in all and by the
number of steps in the right solution.
"""

import argparse
import json
import random
from pathlib import Path

import make_word_problems
from stages import maxlm, once, print_table, read, shown, write

CONFIGS = Path(__file__).parents[2] / "configs" / "recipes" / "word_problems"
SOLVED = 1500  # solutions that SFT sees; GRPO has all questions
FINAL_NUMBER = {"kind": "regex", "pattern": r"#### (-?\d[\d,]*(?:\.\d+)?)"}
MADE_LENGTHS = (192, 80)
GIVEN_LENGTHS = (512, 200)  # GSM8K's questions and solutions are longer


def write_data(folder: Path, train_file: Path, test_file: Path, count: int) -> None:
    """Write the tokenizer's text, the solutions of SFT, and `count` held-out questions as a task of `maxlm eval`."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (read(file) for file in (train_file, test_file))
    (folder / "text.txt").write_text("".join(f"{each['question']}\n{each['answer']}\n" for each in train))
    write(folder / "sft.jsonl", train[:SOLVED])
    write(folder / "task.jsonl", (task(each) for each in random.Random(0).sample(test, min(count, len(test)))))


def task(record: dict[str, str]) -> dict:
    steps = record["answer"].count("<<")
    return {
        "messages": [{"role": "user", "content": record["question"]}],
        "answer": record["answer"],
        "format": FINAL_NUMBER,
        "kind": f"{steps} step" if steps == 1 else f"{steps} steps",
    }


def accuracies(model: Path, file: Path, temperature: float, max_new_tokens: int) -> dict[str, dict[str, float]]:
    """The share of right answers among all questions, and among those of each number of steps."""
    options = ["--temperature", str(temperature), "--max-new-tokens", str(max_new_tokens), "--no-baselines", "--json"]
    found = json.loads(maxlm("eval", str(model), "--task", str(file), *options))["tasks"][0]
    return {"all": found["accuracy"], **found["by_kind"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/word_problems"))
    parser.add_argument("--train", type=Path, help="a file in GSM8K's format (made)")
    parser.add_argument("--test", type=Path, help="another, of held-out questions (made)")
    parser.add_argument("--questions", type=int, default=400, help="held-out questions of the evaluation (400)")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    if (arguments.train is None) != (arguments.test is None):
        parser.error("give both --train and --test, or neither")
    out = arguments.output
    data = out / "data"
    row_length, max_new_tokens = MADE_LENGTHS if arguments.train is None else GIVEN_LENGTHS
    if arguments.train is None:
        make_word_problems.main(data)
    train, test = arguments.train or data / "train.jsonl", arguments.test or data / "test.jsonl"
    write_data(data, train, test, arguments.questions)
    names = [f"input={data}/text.txt", f"output={out}/tokenizer"]
    once(out / "tokenizer", "tokenizer", "train", str(CONFIGS / "tokenizer.yaml"), *names)
    source = f"sources=[{{uri: {train}, text_field: question}}]"
    names = [f"output={out}/rows", f"tokenizer={out}/tokenizer", source]
    once(out / "rows" / "manifest.json", "data", "build", str(CONFIGS / "data.yaml"), *names)
    source = f"objective.sources=[{{path: {out}/rows}}]"
    maxlm("train", str(CONFIGS / "pretrain.yaml"), f"output={out}/pretrain", source)
    options = [f"objective.train_file={data}/sft.jsonl", f"init_from={out}/pretrain", f"row_length={row_length}"]
    maxlm("train", str(CONFIGS / "sft.yaml"), f"output={out}/sft", *options)
    options = [f"objective.train_file={train}", f"objective.valid_file={test}", f"init_from={out}/sft"]
    options += [f"row_length={row_length}", f"objective.max_new_tokens={max_new_tokens}"]
    runs = [out / "sft"]
    for seed in range(arguments.seeds):
        runs.append(out / f"grpo-{seed}")
        maxlm("train", str(CONFIGS / "grpo.yaml"), f"output={runs[-1]}", f"seed={seed}", *options)
    rows = []
    for run in runs:
        greedy, sampled = (accuracies(run, data / "task.jsonl", heat, max_new_tokens) for heat in (0.0, 1.0))
        rows += [(run.name, kind, shown(greedy[kind]), shown(sampled[kind])) for kind in greedy]
    print_table(("run", "questions", "greedy", "sampled"), rows)


if __name__ == "__main__":
    main()
