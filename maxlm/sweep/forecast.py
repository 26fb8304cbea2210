"""`maxlm sweep --dry-run`: the trials of a sweep and their cost."""

from collections.abc import Iterator
from typing import Any

from maxlm.config.load import parse_config
from maxlm.config.sweep import SweepConfig
from maxlm.errors import MaxlmError
from maxlm.runtime.manifest import read_manifest
from maxlm.sweep.outcome import outcome_of, ranked
from maxlm.sweep.records import Records
from maxlm.sweep.trials import TARGET, Plan, Trial, size_of


def forecast(config: SweepConfig) -> dict[str, Any]:
    """List the trials of a sweep and their cost; nothing is run or written.

    A trial whose setting depends on the results of others has none. The time is estimated from the speed of finished
    trials, start-up included, or else of an earlier run of the training configuration itself; without either it is
    None.

    Raises:
      ConfigError: as the sweep itself would.
    """
    plan = Plan(config)
    records = Records(plan.folder / "trials.jsonl")
    trials = [row for scale in range(len(plan.sizes)) for row in _search(plan, scale, records)]
    if plan.runs_target:
        trials += [_row(trial, plan, 0, False, records) for trial in plan.target(plan.settings[0])]
    rate = _rate(plan, records)
    ahead = [trial for trial in trials if not trial["done"]]
    flops = sum(trial["flops"] for trial in ahead)
    return {
        "trials": trials,
        "done": len(trials) - len(ahead),
        "steps": sum(trial["new_steps"] for trial in ahead),
        "flops": flops,
        "flops_per_second": rate,
        "has_run": any(record.status == "finished" for record in records),
        "seconds": flops / rate if rate else None,
    }


def _search(plan: Plan, scale: int, records: Records) -> Iterator[dict[str, Any]]:
    """The trials at one size; settings of rounds after the first are known only once all earlier trials have run."""
    alive, known = plan.settings, True
    for index, rung in enumerate(plan.rungs(scale)):
        groups = [plan.trials(scale, setting, index) for setting in alive[: rung.count]]
        yield from (_row(trial, plan, index, known, records) for group in groups for trial in group)
        found = [[records.find(trial.id, trial.config.steps) for trial in group] for group in groups]
        if known and all(record is not None for group in found for record in group):
            ranking = ranked([outcome_of(group, plan.config.metric) for group in found], plan.config.goal)
            alive = [outcome.setting for outcome in ranking]
        else:
            known = False


def _row(trial: Trial, plan: Plan, index: int, known: bool, records: Records) -> dict[str, Any]:
    new_steps = trial.config.steps - trial.since
    return {
        "trial": trial.id if known else None,
        "size": plan.label(trial.scale),
        "is_target": trial.scale == TARGET,
        "round": index + 1,
        "setting": trial.setting if known else None,
        "seed": trial.config.seed,
        "steps": trial.config.steps,
        "new_steps": new_steps,
        "parameters": trial.size.parameters,
        "tokens": trial.size.tokens,
        "flops": trial.size.flops * new_steps / trial.config.steps,
        "done": known and records.find(trial.id, trial.config.steps) is not None,
    }


def _rate(plan: Plan, records: Records) -> float | None:
    """FLOPs per second."""
    finished = [record for record in records if record.status == "finished"]
    if finished:
        return sum(record.new_flops for record in finished) / sum(record.seconds for record in finished)
    try:
        manifest = read_manifest(plan.base.output)
        size = size_of(parse_config(manifest["config"]))
        return manifest["metrics"]["tokens_per_second"] * size.flops / size.tokens
    except MaxlmError:
        return None
