"""Results of a verification."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from maxlm.verify.subject import Measured

# A float32 sum of n terms differs between two orders by about sqrt(n) half-units in the last place (2^-24) of its
# largest partial sums: for the ~800 tokens and 16 to 350 channels that are summed here, about 1e-6 of the result, and a
# few times that where terms cancel. Measured over all recipes: docs/verify.md. Bugs cause differences of 1e-3
# and larger.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-5

# A parameter whose gradient is this small relative to the largest one contains rounding errors of the others.
_SMALLEST_SHARE = 1e-3


@dataclass(frozen=True)
class Finding:
    """A comparison of one variant with the baseline.

    loss_difference: the largest |difference| of a term's mean, relative to it; `term` is the term's name.
    gradient_difference: the largest |difference| of a parameter's gradient, relative to its largest entry; `parameter`
      is its path, with the layer.
    first: the first parameter, from the model's input to its output, that differs by more than the tolerance, and
      `first_difference`, by how much, relative to its largest entry.
    skipped: why it was not computed; the numbers are then 0.
    seconds: CPU time of all processors.
    """

    group: str
    detail: str
    loss_difference: float = 0.0
    term: str = ""
    gradient_difference: float = 0.0
    parameter: str = ""
    first: str | None = None
    first_difference: float = 0.0
    skipped: str | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.group}: {self.detail}"

    @property
    def verdict(self) -> str:
        """`same`, `differs` or `skipped`."""
        if self.skipped is not None:
            return "skipped"
        # NaN does not count as a small difference.
        same = self.loss_difference <= LOSS_TOLERANCE and self.gradient_difference <= GRADIENT_TOLERANCE
        return "same" if same else "differs"


@dataclass(frozen=True)
class Report:
    """title: the configuration; subject: what was computed, in a sentence; findings: one per variant."""

    title: str
    subject: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict == "differs")

    @property
    def compared(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict != "skipped")

    @property
    def passed(self) -> bool:
        """Whether something was compared, and nothing differs."""
        return bool(self.compared) and not self.failed

    def largest(self) -> dict[str, float]:
        """The largest gradient difference of each group of variants, and of all meshes with an axis."""
        found: dict[str, float] = {}
        for finding in self.compared:
            if finding.parameter:
                axes = [part.partition("=")[0] for part in finding.detail.split(", ") if "=" in part]
                for key in [f"mesh.{axis}" for axis in axes] or [finding.group]:
                    found[key] = max(found.get(key, 0.0), finding.gradient_difference)
        return found

    def to_json(self) -> dict[str, Any]:
        findings = [asdict(finding) | {"verdict": finding.verdict} for finding in self.findings]
        return {**asdict(self), "passed": self.passed, "findings": findings, "largest": self.largest()}


def compare(baseline: Measured, measured: Measured, order: list[str]) -> dict[str, Any]:
    """The numbers of a finding."""
    if baseline.means.keys() != measured.means.keys():
        raise AssertionError(f"terms differ: {sorted(baseline.means)} and {sorted(measured.means)}")
    losses = {name: _relative(measured.means[name], value) for name, value in baseline.means.items()}
    term = _largest(losses)
    floor = _SMALLEST_SHARE * max(np.abs(leaf).max() for leaf in baseline.gradient.values())
    gradients = {}
    for path in order:
        expected = baseline.gradient[path]
        difference = np.abs(measured.gradient[path] - expected) / max(np.abs(expected).max(), floor)
        gradients[path] = difference
    worst = {_name(path, difference): float(difference.max()) for path, difference in gradients.items()}
    parameter = _largest(worst)
    first = next((name for name, value in worst.items() if not value <= GRADIENT_TOLERANCE), None)
    return {
        "loss_difference": losses[term],
        "term": term,
        "gradient_difference": worst[parameter],
        "parameter": parameter,
        "first": first,
        "first_difference": worst.get(first, 0.0),
    }


def _relative(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-3)


def _largest(values: Mapping[str, float]) -> str:
    """The name of the largest value, or of the first NaN."""
    return max(values, key=lambda name: np.inf if np.isnan(values[name]) else values[name])


def _name(path: str, difference: np.ndarray) -> str:
    """A parameter's path and, if layers are stacked, the layer that differs most."""
    if not path.startswith("layers/"):
        return path
    per_layer = difference.reshape(len(difference), -1).max(axis=1)
    return f"{path}[{int(np.argmax(per_layer))}]"
