"""How good each stage's model is, on text and questions that no stage has seen."""

from pathlib import Path
from typing import Any

import numpy as np

import maxlm
from maxlm.core.interval import paired_difference
from maxlm.core.progress import console
from maxlm.eval.baselines import baselines
from maxlm.eval.inputs import read_held_out, read_training
from maxlm.eval.likelihood import bits_per_byte
from maxlm.eval.tasks import Example, TaskResult, exact_match, read_examples
from maxlm.generate.model import LoadedModel

MAX_NEW_TOKENS = 16
ANSWERS_OF_A_QUESTION = 3
SAMPLE_PROMPTS = ("Return the ", "The default value is ", "If the file does not exist, ")
SAMPLES_OF_A_PROMPT = 2


def evaluate_stages(folder: Path) -> dict[str, Any]:
    """Bits per byte of pretraining, exact match before and after SFT, reward before and after alignment, samples.

    Args:
      folder: of the quickstart, with data, tasks, pretrain, sft and align.
    """
    base, tuned, aligned = (maxlm.load(folder / name) for name in ("pretrain", "sft", "align"))
    console.print("measuring held-out text", markup=False)
    valid_texts = read_held_out(folder / "data")
    simple = baselines(read_training(folder / "data"), valid_texts, base.tokenizer).to_dict()
    sizes = {name: simple.pop(name) for name in ("train_bytes", "valid_bytes")}
    likelihood = bits_per_byte(base, valid_texts)

    console.print("asking held-out questions", markup=False)
    questions = read_examples(folder / "tasks" / "questions.jsonl")
    before, after, greedy_aligned = (
        exact_match(model, questions, max_new_tokens=MAX_NEW_TOKENS) for model in (base, tuned, aligned)
    )
    reward_before, reward_after = (_mean_reward(model, questions) for model in (tuned, aligned))
    return {
        "bits_per_byte": {"pretrain": likelihood.bits_per_byte.to_dict(), **simple},
        "text": sizes,
        "sft_exact_match": {
            **_before_after(before.correct, after.correct),
            "aligned": greedy_aligned.accuracy.value,
            "by_kind": {
                kind: {"before": before.by_kind[kind].value, "after": after.by_kind[kind].value}
                for kind in after.by_kind
            },
        },
        "align_reward": _before_after(reward_before, reward_after),
        "samples": [*_texts(base), *_answers(questions, aligned, greedy_aligned)],
    }


def _mean_reward(model: LoadedModel, questions: list[Example]) -> np.ndarray:
    """[questions]: the reward of alignment, which is exact match of a sampled answer, averaged over a few of them."""
    result = exact_match(model, questions * ANSWERS_OF_A_QUESTION, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0)
    return result.correct.reshape(ANSWERS_OF_A_QUESTION, len(questions)).mean(axis=0)


def _before_after(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Both means, and the interval of their difference on the same questions."""
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "interval": list(paired_difference(before, after).bounds),
        "questions": len(after),
    }


def _texts(base: LoadedModel) -> list[dict[str, str]]:
    prompts = [prompt for prompt in SAMPLE_PROMPTS for _ in range(SAMPLES_OF_A_PROMPT)]
    texts = base.generate(prompts, max_new_tokens=48, temperature=0.7, top_p=0.95)
    return [{"stage": "pretrain", "prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)]


def _answers(questions: list[Example], aligned: LoadedModel, result: TaskResult) -> list[dict[str, str]]:
    """The aligned model's answer to the first question of each kind."""
    firsts = {example.kind: number for number, example in reversed(list(enumerate(questions)))}
    return [
        {"stage": "align", "prompt": questions[number].prompt[-1]["content"], "text": result.outputs[number]}
        for number in sorted(firsts.values())
    ]
