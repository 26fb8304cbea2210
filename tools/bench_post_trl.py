"""TRL on the model and the pairs of `bench_post.py`, which runs this file with the interpreter that has TRL.

Prints a number: the median seconds of a DPO step, or tokens per second of rollouts; the first ones are left out.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def dpo(folder: Path, rows: int, length: int, steps: int, **settings: Any) -> float:
    pairs = Dataset.from_list([json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()])
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rows,
        max_steps=steps,
        max_length=length,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    times = StepTimes()
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="float32")
    DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer, callbacks=[times]).train()
    return statistics.median(times.seconds[2:])


class TimedRollouts(GRPOTrainer):
    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        completions, log_probabilities = super()._generate_single_turn(*args, **kwargs)
        self.rates = [*getattr(self, "rates", []), sum(map(len, completions)) / (time.perf_counter() - start)]
        return completions, log_probabilities


def rollouts(folder: Path, rows: int, group: int, tokens: int, steps: int) -> float:
    prompts = Dataset.from_list([json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()])
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rows,
        num_generations=group,
        max_completion_length=tokens,
        max_steps=steps,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = TimedRollouts(
        AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="float32"),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=config,
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(folder / "hf"),
    )
    trainer.train()
    return statistics.median(trainer.rates[1:])


if __name__ == "__main__":
    folder, what, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    print(json.dumps({"dpo": dpo, "rollouts": rollouts}[what](folder, **settings)))
