"""Acceptance checks of the quickstart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maxlm.errors import CheckFailed

Summary = dict[str, Any]

# Largest relative change of perplexity by int8.
INT8_BOUND = 0.005


@dataclass(frozen=True)
class Check:
    """A requirement on the quickstart, what was measured, and what to do if it fails."""

    name: str
    passed: bool
    measured: str
    remedy: str


class ChecksFailed(CheckFailed):
    """The quickstart completed, but some checks failed."""

    def __init__(self, failed: list[Check]):
        super().__init__("; ".join(f"{check.name}: {check.measured}; {check.remedy}" for check in failed))


def checks(summary: Summary) -> list[Check]:
    """The checks of a `summary.json`; a check whose stage did not complete fails."""
    found = []
    for name, stage, judge, remedy in _CHECKS:
        missing = summary["not_done"].get(stage)
        passed, measured = (False, f"not measured: {missing}") if missing else judge(summary)
        found.append(Check(name, passed, measured, remedy))
    return found


def _beats_baselines(summary: Summary) -> tuple[bool, str]:
    bits = summary["bits_per_byte"]
    model, bigram, xz = bits["pretrain"], bits["bigram"], bits["xz"]
    return (
        model["high"] < bigram["value"] and model["value"] < xz,
        f"{model['value']:.3f} bits per byte [{model['low']:.3f}, {model['high']:.3f}] against {bigram['value']:.3f}"
        f" and {xz:.3f}; xz after the training text: {bits['xz_after_training']:.3f}",
    )


def _lifts_exact_match(summary: Summary) -> tuple[bool, str]:
    match = summary["sft_exact_match"]
    return match["interval"][0] > 0.2, _before_after(match)


def _lifts_reward(summary: Summary) -> tuple[bool, str]:
    reward = summary["align_reward"]
    return reward["interval"][0] > 0, _before_after(reward)


def _keeps_perplexity(summary: Summary) -> tuple[bool, str]:
    """Fails if the whole interval is out of bounds: a point estimate alone may be chance."""
    int8 = summary["int8"]
    low, high = int8["perplexity_change_low"], int8["perplexity_change_high"]
    size = 1 - int8["bytes_int8"] / int8["bytes_float"]
    return (
        low <= INT8_BOUND and high >= -INT8_BOUND,
        f"{int8['perplexity_change']:+.3%} [{low:+.3%}, {high:+.3%}], {size:.0%} fewer bytes",
    )


def _streams_answers(summary: Summary) -> tuple[bool, str]:
    answers = summary["chat"]["answers"]
    right = sum(answer["right"] for answer in answers)
    return (
        all(answer["reply"].strip() and answer["events"] > 1 for answer in answers),
        f"{len(answers)} questions asked, {right} answers correct",
    )


def _before_after(values: dict[str, Any]) -> str:
    low, high = values["interval"]
    return (
        f"{values['before']:.1%} to {values['after']:.1%}, difference [{low:+.1%}, {high:+.1%}]"
        f" over {values['questions']:,} questions"
    )


# Name, the stage that measures it, (summary) -> (passed, what was measured), and what to do if it fails.
_CHECKS: tuple[tuple[str, str, Callable[[Summary], tuple[bool, str]], str], ...] = (
    (
        "pretraining beats a bigram model and xz",
        "evaluate",
        _beats_baselines,
        "train longer: maxlm quickstart pretrain.steps=800",
    ),
    (
        "SFT improves exact match on held-out questions",
        "evaluate",
        _lifts_exact_match,
        "train longer: maxlm quickstart sft.steps=200",
    ),
    (
        "alignment improves its reward",
        "evaluate",
        _lifts_reward,
        "train longer: maxlm quickstart align.steps=150",
    ),
    (
        f"int8 costs at most {INT8_BOUND:.1%} perplexity",
        "int8",
        _keeps_perplexity,
        "the float model is served instead; maxlm export MODEL OUTPUT --max-perplexity-change X allows more",
    ),
    (
        "the server streams answers",
        "chat",
        _streams_answers,
        "start it manually to see why: maxlm serve MODEL",
    ),
)
