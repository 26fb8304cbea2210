"""The table of which settings of a training run may change when it is resumed.

A setting that no pattern matches is part of what the run means, so a new field is compared until it is listed here.
"""

import enum
import fnmatch
from collections.abc import Iterator
from typing import Any

from maxlm.config.layers import key_as_written


class Change(enum.Enum):
    """How to treat a setting that differs from the one that a run was trained with."""

    REFUSED = "the run would be a different one: a new folder is needed"
    ASKED = "the run would mean something else: refused unless the user accepts it, and then recorded"
    REPORTED = "allowed; reported, and recorded"
    FREE = "allowed: the trained weights do not depend on it"


# The first pattern that matches a dotted key applies; * matches anything.
_RULES: tuple[tuple[Change, tuple[str, ...]], ...] = (
    (
        Change.FREE,
        (
            # Names of folders: the content of input folders is compared by its hash.
            "output",
            # How often something is measured, saved or logged, and how processes wait for each other.
            *("log_every", "eval_every", "eval_batches", "objective.valid_file", "checkpoint.*", "processes.*"),
            # How a step is computed: principle 5 of docs/architecture.md.
            *("mesh.*", "accumulate", "execution.remat", "execution.unroll", "execution.pipeline.*"),
            *("execution.loss_chunk_length", "execution.attention", "execution.context_attention"),
            *("execution.experts", "execution.max_length"),
            # How a judge is reached, and how much of it is paid for.
            *("objective.*.limits.*", "objective.*.judge.concurrent", "objective.*.judge.requests_per_minute"),
            *("objective.*.judge.timeout_seconds", "objective.*.judge.retries", "objective.*.judge.retry_seconds"),
            *("objective.*.judge.prices*", "objective.*.judge.api_key_variable"),
        ),
    ),
    (
        Change.REPORTED,
        (
            # How precisely it is computed.
            *("execution.activation_dtype", "execution.matmul_dtype", "execution.eight_bit"),
            "execution.gradient_sum_dtype",
            # Which steps are skipped, each of which is recorded.
            "guard.*",
            # How long it trains, and thus the position in the schedule.
            "steps",
        ),
    ),
    (
        Change.REFUSED,
        (
            "kind",
            "objective.kind",
            "model",
            "model.*",
            "execution",
            "execution.*",
            "adapters",
            "adapters.*",
            "init_from",
            "tokenizer",
            "chat_template",
            "optim.kind",
        ),
    ),
    (Change.ASKED, ("*",)),
)


def change_of(key: str) -> Change:
    """How to treat a change of the setting with this dotted key, such as `optim.schedule.kind`."""
    return next(change for change, patterns in _RULES if any(fnmatch.fnmatchcase(key, each) for each in patterns))


def differences(before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two configurations (nested dicts) differ: dotted key, value before, value now.

    A section that one of them lacks, and a list of another length, count as one difference. A key that only one of them
    has belongs to another `kind` or another version of maxlm, and is not a difference.
    """
    for key, old, new in _differences(before, now, ""):
        yield key_as_written(key, before), old, new


def _differences(before: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before:
            if name in now:
                yield from _differences(before[name], now[name], _below(key, name))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now)):
            yield from _differences(old, new, _below(key, str(index)))
    elif before != now:
        yield key, before, now


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
