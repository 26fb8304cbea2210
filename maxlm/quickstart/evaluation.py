"""Evaluate each stage's model on held-out text and questions."""

from pathlib import Path
from typing import Any

import numpy as np

import maxlm
from maxlm.core.interval import paired_difference
from maxlm.eval.baselines import baselines
from maxlm.eval.inputs import read_held_out_texts, read_training
from maxlm.eval.likelihood import bits_per_byte
from maxlm.eval.tasks import Example, read_examples
from maxlm.generate.model import LoadedModel
from maxlm.runtime.progress import console

SAMPLE_PROMPTS = ("Return the ", "The default value is ", "If the file does not exist, ")
SAMPLES_OF_A_PROMPT = 2


def evaluate_stages(folder: Path) -> dict[str, Any]:
    """Bits per byte of pretraining, exact match before and after SFT, reward before and after alignment, samples.

    Args:
      folder: the quickstart folder, with data, tasks, pretrain, sft and align.
    """
    base, tuned, aligned = (maxlm.load(folder / name) for name in ("pretrain", "sft", "align"))
    console.print("evaluating on held-out text", markup=False)
    valid_texts = read_held_out_texts(folder / "data")
    simple = baselines(read_training(folder / "data"), valid_texts, base.tokenizer).to_dict()
    sizes = {name: simple.pop(name) for name in ("train_bytes", "valid_bytes")}
    likelihood = bits_per_byte(base, valid_texts)

    console.print("evaluating on held-out questions", markup=False)
    questions = read_examples(folder / "tasks" / "questions.jsonl")
    (greedy_base, _), (greedy_tuned, reward_tuned), (greedy_aligned, reward_aligned) = (
        rate_answers(model, questions) for model in (base, tuned, aligned)
    )
    kinds = np.array([question.kind for question in questions])
    return {
        "bits_per_byte": {"pretrain": likelihood.bits_per_byte.to_dict(), **simple},
        "text": sizes,
        "sft_exact_match": {
            **_before_after(greedy_base, greedy_tuned),
            "aligned": float(greedy_aligned.mean()),
            "by_kind": {
                str(kind): {
                    "before": float(greedy_base[kinds == kind].mean()),
                    "after": float(greedy_tuned[kinds == kind].mean()),
                }
                for kind in np.unique(kinds)
            },
        },
        "align_reward": _before_after(reward_tuned, reward_aligned),
        "samples": _texts(base),
    }


def rate_answers(model: LoadedModel, questions: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Exact match of each question's greedy answer, and the expected exact match of a sampled answer.

    One forward pass over question, correct answer and end of turn gives both, without generation: the greedy answer is
    correct if each of its tokens is the most likely one, and the probability of sampling the correct answer at
    temperature 1 is the product of its tokens' probabilities, which is the expected alignment reward without sampling
    noise. Both ignore that other token sequences may spell the same text.

    Returns:
      (greedy [questions], 0 or 1; expected reward [questions], 0 to 1).
    """
    end = [model.tokenizer.end_of_turn_id]
    scores = model.score_tokens(
        [model.encode(question.prompt) for question in questions],
        [model.tokenizer.encode(question.answer) + end for question in questions],
    )
    greedy = np.array([score.is_greedy for score in scores], np.float64)
    return greedy, np.exp([score.log_probability for score in scores])


def _before_after(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Both means, and the interval of the paired difference."""
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
