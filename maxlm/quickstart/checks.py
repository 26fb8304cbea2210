"""What the main job must show, in numbers."""

from dataclasses import dataclass
from typing import Any

from maxlm.errors import CheckFailed


class ChecksFailed(CheckFailed):
    """The main job ran to its end and did not show all that it must."""

    def __init__(self, summary: dict[str, Any], failed: "list[Check]"):
        self.summary = summary
        super().__init__("; ".join(f"{check.name}: {check.told}" for check in failed))


@dataclass(frozen=True)
class Check:
    """One thing that the main job must show."""

    name: str
    passed: bool
    told: str


def checks(summary: dict[str, Any]) -> list[Check]:
    """The checks of a `summary.json`."""
    bits, match, reward = summary["bits_per_byte"], summary["sft_exact_match"], summary["align_reward"]
    model, bigram, xz = bits["pretrain"], bits["bigram"], bits["xz"]
    change, reply = summary["int8"]["perplexity_change"], summary["chat"]["reply"]
    return [
        Check(
            "pretraining beats a bigram model and xz",
            model["high"] < bigram["value"] and model["value"] < xz,
            f"{model['value']:.3f} bits per byte [{model['low']:.3f}, {model['high']:.3f}]"
            f" against {bigram['value']:.3f} and {xz:.3f}; xz after the training text:"
            f" {bits['xz_after_training']:.3f}",
        ),
        Check(
            "SFT lifts exact match on held-out questions",
            match["interval"][0] > 0.2,
            f"{match['before']:.1%} to {match['after']:.1%}, difference {_interval(match['interval'])}",
        ),
        Check(
            "alignment lifts its reward",
            reward["interval"][0] > 0,
            f"{reward['before']:.1%} to {reward['after']:.1%}, difference {_interval(reward['interval'])}",
        ),
        Check("int8 costs at most 0.5 % perplexity", abs(change) <= 0.005, f"{change:+.3%}"),
        Check("the server streams an answer", bool(reply) and summary["chat"]["events"] > 1, f"{reply!r}"),
    ]


def _interval(bounds: list[float]) -> str:
    return f"[{bounds[0]:+.1%}, {bounds[1]:+.1%}]"
