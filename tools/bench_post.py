"""Benchmark post-training: LoRA against whole steps, DPO and rollouts against TRL; medians and ratios.

    python tools/bench_post.py [lora dpo rollouts sums] [--cores 2] [--trl PYTHON]

The model is the Llama shape of 6.9 million parameters (`plain_llama.py`). `--trl` names an interpreter with TRL, which
is then measured on the same weights, tokenizer and texts. Both sides run on the first `--cores` cores. `sums` is the
recipe of sums below 20 (`recipes/sums.py`) with three seeds. The results in docs/benchmarks.md are from this tool.
"""

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml

TOOLS = Path(__file__).parent
ROWS, LENGTH = 8, 256
GROUP, ANSWER_LENGTH, PROMPT_LENGTH = 8, 128, 32


def lora(args: argparse.Namespace) -> None:
    """Training steps of all weights and of LoRA, under the same recomputation."""
    from benchmark import measure, training

    title, variants = training()
    print(f"\n{title}\n| products, remat | all weights, tokens/s | LoRA, tokens/s | ratio |\n| --- | --- | --- | --- |")
    for dtype in ("float32", "bfloat16"):
        for remat in ("none", "dots", "full"):
            names = [f"{kind}{dtype}, remat {remat}" for kind in ("", "LoRA, ")]
            found = measure({name: variants[name] for name in names}, args.repeats)
            whole, adapted = (ROWS * LENGTH / found[name][0] for name in names)
            print(f"| {dtype}, {remat} | {whole:.0f} | {adapted:.0f} | {adapted / whole:.2f} |", flush=True)


def dpo(args: argparse.Namespace) -> None:
    """Steps of `maxlm train` and of TRL's trainer on the same pairs. Tokens are those of the texts, without padding."""
    steps = 3 + args.repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        tokens = ROWS * make_pairs(folder, ROWS * steps)
        rates = {}
        if args.trl:
            computed = {"precompute_ref_log_probs": True}
            for words, settings in (
                ("", {}),
                (", reference computed before", computed),
                (", the same, without recomputation", {**computed, "gradient_checkpointing": False}),
            ):
                seconds = with_trl(args, folder, "dpo", rows=ROWS, length=LENGTH, steps=steps, **settings)
                rates[f"TRL, float32{words}"] = tokens / seconds
        for dtype in ("float32", "auto"):
            run = folder / dtype
            settings = {
                "output": str(run),
                "init_from": str(folder / "run"),
                "objective": {"kind": "preference", "train_file": str(folder / "pairs.jsonl")},
                "execution": {"activation_dtype": "float32", "matmul_dtype": dtype, "max_length": LENGTH},
                "optim": {"kind": "adamw", "learning_rate": 1.0e-6},
                "steps": steps,
            }
            train(folder, **settings)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            # Two rows a pair, padded to LENGTH (`make_pairs`).
            seconds = [2 * ROWS * LENGTH / line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
            rates[f"maxlm, {dtype} products"] = tokens / statistics.median(seconds[2:])
    show(f"DPO, {ROWS} pairs of up to {LENGTH} tokens, steps", rates)


def rollouts(args: argparse.Namespace) -> None:
    """Sampling of answers in training, by the engine with the same weights, and by TRL's GRPO trainer."""
    import bench_rollout
    import plain_llama
    from benchmark import llama_config

    from maxlm.config.execution import ExecutionConfig
    from maxlm.models.decoder import Decoder

    for answers in (GROUP, 8 * GROUP):
        rates: dict[str, float] = {}
        for dtype in ("float32", "auto"):
            execution = ExecutionConfig(max_length=LENGTH, activation_dtype="float32", matmul_dtype=dtype)
            plan = Decoder(llama_config(plain_llama.Shape()), execution)
            sizes = argparse.Namespace(rows=answers, group=GROUP, tokens=ANSWER_LENGTH)
            found = bench_rollout.measure(bench_rollout.variants(plan, sizes, ends=0.0), args.repeats)
            rates |= {f"{name}, {dtype} products": rate for name, (_, rate) in found.items()}
        if args.trl:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                make_model(folder)
                make_prompts(folder)
                sizes_of_trl = {"rows": answers, "group": GROUP, "tokens": ANSWER_LENGTH}
                rates["TRL, float32"] = with_trl(args, folder, "rollouts", steps=1 + args.repeats // 2, **sizes_of_trl)
        show(f"{answers} answers of {ANSWER_LENGTH} tokens in groups of {GROUP}", rates)


def sums(args: argparse.Namespace) -> None:
    """GRPO and PPO on sums below 20, three seeds."""
    subprocess.run([sys.executable, str(TOOLS / "recipes" / "sums.py"), "runs/sums", "--seeds", "3"], check=True)


def show(title: str, rates: dict[str, float]) -> None:
    first = next(iter(rates.values()))
    print(f"\n{title}\n| variant | tokens/s | ratio |\n| --- | --- | --- |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / first:.2f} |", flush=True)


def with_trl(args: argparse.Namespace, folder: Path, what: str, **settings: Any) -> float:
    command = [args.trl, str(TOOLS / "bench_post_trl.py"), str(folder), what, json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.cores), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def maxlm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "maxlm.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def train(folder: Path, **settings: Any) -> None:
    fixed = {"kind": "train", "batch_size": ROWS, "row_length": LENGTH, "log_every": 1, "eval_every": 0}
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump({**fixed, **settings}))
    maxlm("train", str(path))


def make_model(folder: Path) -> None:
    """`run`, a model of ours after one step on the help texts of Python, and `hf`, the same for transformers."""
    import plain_llama
    from benchmark import llama_config

    (folder / "text.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    sources = [{"uri": str(folder / "text.txt"), "split_on_blank_lines": 400}]
    for kind, command, settings in (
        ("tokenizer", ("tokenizer", "train"), {"input": str(folder / "text.txt"), "vocab_size": 2048}),
        ("data", ("data", "build"), {"tokenizer": str(folder / "tokenizer"), "sources": sources, "row_length": LENGTH}),
    ):
        path = folder / f"{kind}.yaml"
        path.write_text(yaml.safe_dump({"kind": kind, "output": str(folder / kind), **settings}))
        maxlm(*command, str(path))
    model = llama_config(plain_llama.Shape()).model_dump(mode="json", exclude={"vocab_size"}, exclude_defaults=True)
    objective = {"kind": "pretrain", "sources": [{"path": str(folder / "data")}]}
    train(folder, output=str(folder / "run"), model=model, objective=objective, steps=1)
    maxlm("export", str(folder / "run"), str(folder / "hf"), "--format", "hf")


def text_of(count: Callable[[str], int], random_numbers: random.Random, tokens: int) -> str:
    """Words of the help texts, up to this many tokens."""
    words = " ".join(topics.values()).split()
    start = random_numbers.randrange(len(words) - tokens)
    text = words[start]
    for word in words[start + 1 : start + tokens]:
        if count(f"{text} {word}") > tokens:
            break
        text = f"{text} {word}"
    return text


def make_pairs(folder: Path, number: int) -> float:
    """Write pairs whose answers differ in length; return the mean tokens of both texts of a pair."""
    from maxlm.tokenizer.codec import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer")
    numbers = random.Random(0)
    make = functools.partial(text_of, lambda text: len(tokenizer.encode(text)), numbers)
    pairs, tokens = [], 0
    for index in range(number):
        # The first pair is as long as any, so that rows are LENGTH long.
        lengths = {name: 180 if index == 0 else numbers.randint(90, 180) for name in ("chosen", "rejected")}
        pair = {"prompt": make(64)} | {name: " " + make(length) for name, length in lengths.items()}
        pairs.append(json.dumps(pair))
        tokens += sum(len(tokenizer.encode(pair["prompt"] + pair[name])) for name in lengths)
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    return tokens / number


def make_prompts(folder: Path) -> None:
    from maxlm.tokenizer.codec import Tokenizer

    tokenizer, numbers = Tokenizer.load(folder / "tokenizer"), random.Random(0)
    prompts = [text_of(lambda text: len(tokenizer.encode(text)), numbers, PROMPT_LENGTH) for _ in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))


BENCHMARKS = {"lora": lora, "dpo": dpo, "rollouts": rollouts, "sums": sums}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help="default: all")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment with TRL")
    args = parser.parse_args()
    # Before JAX starts its threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    print(f"{args.cores} core(s)")
    for name in args.names or BENCHMARKS:
        BENCHMARKS[name](args)


if __name__ == "__main__":
    main()
