"""Analysis of a sweep's outcomes: the best setting, the laws, the prediction for a larger size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from maxlm.config.train import TrainConfig
from maxlm.errors import ConfigError
from maxlm.sweep.law import PowerLaw, ScalingLaw, fit_power_law, fit_scaling_law
from maxlm.sweep.optimum import Optimum, find_optimum
from maxlm.sweep.outcome import Outcome, ranked
from maxlm.sweep.space import Setting, round_digits
from maxlm.sweep.trials import TARGET, Plan, Size


@dataclass(frozen=True)
class FieldLaw:
    """The optimum of a field at each size, and its power law; None with fewer than two sizes."""

    name: str
    points: tuple[tuple[float, Optimum], ...]
    law: PowerLaw | None


@dataclass(frozen=True)
class Prediction:
    """Predicted metric of the target with `setting`: `low` and `high` bound one run's result with 95%, noise included.

    They are None if there are too few points to estimate the noise.
    """

    setting: Setting
    size: Size
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Analysis:
    """`outcomes` has all outcomes; `final` those of the last round at each size, best first."""

    outcomes: tuple[Outcome, ...]
    final: dict[int, list[Outcome]]
    best: Outcome
    law: ScalingLaw | None = None
    field_laws: tuple[FieldLaw, ...] = ()
    prediction: Prediction | None = None
    measured: Outcome | None = None
    notes: tuple[str, ...] = ()

    def summary(self, plan: Plan) -> dict[str, Any]:
        """All results, as JSON values."""
        records = [record for outcome in self._all() for record in outcome.records]
        return {
            "trials": {
                status: sum(record.status == status for record in records)
                for status in ("finished", "diverged", "failed")
            },
            "seconds": round(sum(record.seconds for record in records), 1),
            "flops": sum(record.new_flops for record in records),
            "metric": plan.config.metric,
            "best": {
                "setting": self.best.setting,
                "size": plan.label(self.best.scale),
                "value": self.best.value,
                "trial": self.best.records[0].id,
            },
            "ranking": [
                {"size": plan.label(o.scale), "setting": o.setting, "steps": o.steps, "value": o.value}
                for ranking in reversed(self.final.values())
                for o in ranking
            ],
            "sizes": self.law_rows(plan) if self.law else [],
            "law": self.law and _law_summary(self.law),
            "optima": {field.name: _field_summary(field) for field in self.field_laws},
            "prediction": self.prediction and asdict(self.prediction),
            "measured": self.measured and {"value": self.measured.value, "trial": self.measured.records[0].id},
            "notes": list(self.notes),
        }

    def law_rows(self, plan: Plan) -> list[tuple[str, str, str, str]]:
        """For each size: label, x, the law's value with the interval for one run, the measured value."""
        against, rows = plan.config.scales.against, []
        for scale, ranking in self.final.items():
            if ranking:
                x = float(getattr(ranking[0].records[0], against))
                rows.append((plan.label(scale), f"{x:.3g}", f"{self.law.loss(x):.4f}", f"{ranking[0].value:.4f}"))
        if (prediction := self.prediction) is not None:
            predicted, measured = f"{prediction.value:.4f}", "not run"
            if prediction.low is not None:
                predicted += f" [{prediction.low:.4f}, {prediction.high:.4f}]"
            if self.measured is not None:
                value = self.measured.value
                measured = f"{value:.4f}" if value is not None else self.measured.records[0].status
            x = float(getattr(prediction.size, against))
            rows.append((f"{plan.label(TARGET)} (predicted)", f"{x:.3g}", predicted, measured))
        return rows

    def _all(self) -> tuple[Outcome, ...]:
        return (*self.outcomes, *([self.measured] if self.measured else []))


def analyse(plan: Plan, outcomes: Sequence[Outcome]) -> Analysis:
    """Rank the outcomes and, for several sizes, fit the laws and predict the target. At least one has finished."""
    goal = plan.config.goal
    final = {}
    for scale in range(len(plan.sizes)):
        here = [outcome for outcome in outcomes if outcome.scale == scale]
        # Rounds of different lengths are not comparable: use the longest that any trial has finished.
        longest = max((outcome.steps for outcome in here if outcome.value is not None), default=None)
        final[scale] = ranked([outcome for outcome in here if outcome.steps == longest], goal)
    best = [ranking[0] for ranking in final.values() if ranking][-1]
    if plan.config.scales is None:
        return Analysis(tuple(outcomes), final, best, notes=_edge_notes(plan, final))

    against = plan.config.scales.against
    tops = [ranking[0] for ranking in final.values() if ranking]
    points = [(getattr(top.records[0], against), value) for top in tops for value in top.values]
    notes = list(_edge_notes(plan, final))
    law = None
    if len({x for x, _ in points}) >= 3:
        xs, ys = zip(*points)
        law = fit_scaling_law(xs, ys)
        if law.noise is None:
            notes.append(
                "Three points determine the law's three parameters and leave nothing to estimate the noise from."
            )
    else:
        notes.append("Fewer than three sizes have a finished trial: no law can be fitted.")
    field_laws = tuple(_field_law(plan, name, final) for name in plan.config.fields)
    field_laws = tuple(field for field in field_laws if field is not None)
    prediction = None
    if law is not None and plan.config.scales.target is not None:
        prediction, found = _predict(plan, law, field_laws, tops[-1])
        notes += found
    return Analysis(tuple(outcomes), final, best, law, field_laws, prediction, notes=tuple(notes))


def best_config(plan: Plan, analysis: Analysis) -> TrainConfig:
    """The configuration to train with: the target with the predicted setting, or else the best trial's."""
    setting = analysis.prediction.setting if analysis.prediction else analysis.best.setting
    if analysis.prediction:
        config = plan.target(setting)[0].config
    else:
        rounds = len(plan.rungs(analysis.best.scale))
        trials = [trial for rung in range(rounds) for trial in plan.trials(analysis.best.scale, setting, rung)]
        config = next(trial for trial in trials if trial.config.steps == analysis.best.steps).config
    return config.model_copy(update={"output": str(plan.folder / "best")})


def _field_law(plan: Plan, name: str, final: dict[int, list[Outcome]]) -> FieldLaw | None:
    """The law of a field; None if its values are not positive numbers."""
    points = []
    for ranking in final.values():
        optimum = find_optimum(ranking, name)
        if optimum is not None:
            points.append((float(getattr(ranking[0].records[0], plan.config.scales.against)), optimum))
    if not points:
        return None
    xs, ys = [x for x, _ in points], [optimum.value for _, optimum in points]
    return FieldLaw(name, tuple(points), fit_power_law(xs, ys) if len(points) > 1 else None)


def _predict(
    plan: Plan, law: ScalingLaw, field_laws: Sequence[FieldLaw], largest: Outcome
) -> tuple[Prediction, list[str]]:
    """Predict the target's setting: each field from its law, or else its best value at the largest size of the ladder.

    A law is extrapolated to larger sizes, but not to values outside the tried range.
    """
    against = plan.config.scales.against
    x = float(getattr(plan.target(largest.setting)[0].size, against))
    predicted_fields: Setting = {}
    notes = []
    for field in field_laws:
        if field.law is None:
            continue
        tried = [setting[field.name] for setting in plan.settings]
        extrapolated = float(field.law.value(x))
        value = min(max(extrapolated, min(tried)), max(tried))
        if value != extrapolated:
            notes.append(f"{field.name}: its law gives {extrapolated:.3g} at the target, outside the tried range.")
        predicted_fields[field.name] = round(value) if field.name in plan.integers else round_digits(value)
    setting = {**largest.setting, **predicted_fields}
    try:
        size = plan.target(setting)[0].size
    except ConfigError as error:
        notes.append(f"The target uses the best setting of the previous size: {error.problems[0]}")
        setting = largest.setting
        size = plan.target(setting)[0].size
    value, low, high = law.predict(float(getattr(size, against)))
    return Prediction(setting, size, value, low, high), notes


def _edge_notes(plan: Plan, final: dict[int, list[Outcome]]) -> tuple[str, ...]:
    notes = []
    for name in plan.config.fields:
        for scale, ranking in final.items():
            optimum = find_optimum(ranking, name, sign=1 if plan.config.goal == "minimize" else -1)
            if optimum is not None and optimum.at_edge and len({o.setting[name] for o in ranking}) > 1:
                where = f" at {plan.label(scale)}" if len(final) > 1 else ""
                notes.append(f"{name}: {optimum.value:g} is at the edge of the tried range{where}; extend the range.")
    return tuple(notes)


def _law_summary(law: ScalingLaw) -> dict[str, Any]:
    names = ("irreducible", "coefficient", "exponent")
    return {name: {"value": getattr(law, name), "interval": law.interval(name)} for name in names} | {
        "noise": law.noise
    }


def _field_summary(field: FieldLaw) -> dict[str, Any]:
    return {
        "points": [{"at": x, "value": optimum.value, "at_edge": optimum.at_edge} for x, optimum in field.points],
        "exponent": field.law and {"value": field.law.exponent, "interval": field.law.exponent_interval},
    }
