"""`maxlm sweep`: run trials one after another, each in its own process, and analyze them.

A trial recorded in `trials.jsonl` is not run again, and an interrupted one resumes from its checkpoint: the same
command resumes where it stopped.
"""

import difflib
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from maxlm.config.load import dump_yaml
from maxlm.config.recipes import find_config
from maxlm.config.sweep import SweepConfig
from maxlm.errors import CheckFailed, ConfigError
from maxlm.runtime.manifest import write_json, write_manifest
from maxlm.runtime.progress import console, progress_bar
from maxlm.runtime.storage import is_remote
from maxlm.sweep.analysis import Analysis, analyse, best_config
from maxlm.sweep.outcome import Outcome, outcome_of, ranked
from maxlm.sweep.page import write_sweep_page
from maxlm.sweep.records import Record, Records
from maxlm.sweep.runner import hold_folder, run_trial
from maxlm.sweep.trials import Plan, Trial, describe_setting

BEST = "best.yaml"


def run_sweep(config: SweepConfig, *, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run or resume a sweep, write its results, and return the summary of `manifest.json`.

    Args:
      config: the sweep.
      environment: of the trials' processes.

    Raises:
      ConfigError: the sweep or one of its training configurations is invalid.
      CheckFailed: every trial failed or diverged.
      MaxlmError: data or tokenizer are missing; another sweep runs in the folder.
    """
    check_sweep_output(config)
    plan = Plan(config)
    with hold_folder(plan.folder) as lock:
        sweep = _Sweep(plan, environment, lock)
        return sweep.run()


def check_sweep_output(config: SweepConfig) -> None:
    """Raise ConfigError for a folder in a bucket: records are appended, and a lock is held."""
    if is_remote(config.output):
        raise ConfigError([f"output: {config.output} must be a local folder; copy it to a bucket when it is done"])


class _Sweep:
    def __init__(self, plan: Plan, environment: Mapping[str, str], lock: int):
        self.plan, self.config, self.folder = plan, plan.config, plan.folder
        self.environment, self.lock = environment, lock
        self.records = Records(self.folder / "trials.jsonl")

    def run(self) -> dict[str, Any]:
        with progress_bar("sweep", total_steps(self.plan)) as (self.progress, self.task):
            searched = {scale: self._search(scale) for scale in range(len(self.plan.sizes))}
            found = [outcome for outcomes in searched.values() for outcome in outcomes]
            if not ranked(found, self.config.goal):
                self._fail(found)
            analysis = analyse(self.plan, found)
            if analysis.prediction is not None:
                write_json(self.folder / "prediction.json", asdict(analysis.prediction))
                if self.plan.runs_target:
                    measured = self._outcome(self.plan.target(analysis.prediction.setting))
                    analysis = replace(analysis, measured=measured)
        return self._write(analysis)

    def _search(self, scale: int) -> list[Outcome]:
        """Run every round at one size; return all outcomes."""
        alive, outcomes, best = self.plan.settings, [], []
        for index, rung in enumerate(self.plan.rungs(scale)):
            latest = [self._outcome(self.plan.trials(scale, setting, index)) for setting in alive[: rung.count]]
            outcomes += latest
            best = ranked(latest, self.config.goal)
            alive = [outcome.setting for outcome in best]
        if self.config.keep_checkpoints != "all":
            kept = {record.id for outcome in best[:1] for record in outcome.records}
            self._drop_checkpoints(outcomes, keep=kept if self.config.keep_checkpoints == "best" else set())
        return outcomes

    def _outcome(self, trials: list[Trial]) -> Outcome:
        return outcome_of([self._record(trial) for trial in trials], self.config.metric)

    def _record(self, trial: Trial) -> Record:
        """The record of a trial, which is run unless it has one."""
        record = self.records.find(trial.id, trial.config.steps)
        if record is None:
            known = self.progress.tasks[0].completed
            self.progress.update(self.task, note=describe_setting(trial.setting))
            record = run_trial(
                trial,
                environment=self.environment,
                lock=self.lock,
                seconds=self.config.trial_seconds,
                on_step=lambda step: self.progress.update(self.task, completed=known + max(0, step - trial.since)),
            )
            self.progress.update(self.task, completed=known)
            check_metric(self.config, record)
            self.records.add(record)
            console.print(self._line(trial, record), markup=False)
        self.progress.advance(self.task, trial.config.steps - trial.since)
        return record

    def _line(self, trial: Trial, record: Record) -> str:
        size = f"{self.plan.label(trial.scale)}: " if self.config.scales else ""
        value = record.value(self.config.metric)
        outcome = f"{self.config.metric} {value:.4f}" if value is not None else f"{record.status}: {record.error}"
        seed = f" seed={record.seed}" if self.config.seeds else ""
        where = f"{size}{describe_setting(trial.setting)}{seed}, {record.steps} steps"
        return f"trial {record.id}  {where}  {outcome}  ({record.seconds:.0f} s)"

    def _drop_checkpoints(self, outcomes: list[Outcome], *, keep: Collection[str]) -> None:
        for outcome in outcomes:
            for record in outcome.records:
                if record.id not in keep:
                    shutil.rmtree(self.folder / "trials" / record.id / "checkpoints", ignore_errors=True)

    def _fail(self, outcomes: list[Outcome]) -> None:
        records = [record for outcome in outcomes for record in outcome.records]
        first = next((record for record in records if record.error), records[0])
        log = self.folder / "trials" / f"{first.id}.log"
        raise CheckFailed(f"{self.folder}: none of {len(records)} trials finished; first error: {first.error} ({log})")

    def _write(self, analysis: Analysis) -> dict[str, Any]:
        (self.folder / BEST).write_text(dump_yaml(best_config(self.plan, analysis)), encoding="utf-8")
        summary = analysis.summary(self.plan)
        write_sweep_page(self.folder / "index.html", self.plan, analysis)
        write_manifest(
            self.folder,
            stage="sweep",
            inputs={"train": str(find_config(self.config.train)), **self.plan.inputs},
            config=self.config.model_dump(mode="json"),
            metrics=summary,
        )
        return summary


def check_metric(config: SweepConfig, record: Record) -> None:
    """Raise ConfigError if a finished trial does not have the metric."""
    if record.status != "finished" or config.metric in record.valid:
        return
    if not record.valid:
        raise ConfigError([f"{config.train}: has no held-out data to validate on; set valid_fraction or valid_file"])
    near = difflib.get_close_matches(config.metric, record.valid, 1)
    hint = f"did you mean {near[0]}?" if near else f"the metrics are {', '.join(record.valid)}"
    raise ConfigError([f"metric: the validation has no {config.metric}; {hint}"])


def total_steps(plan: Plan) -> int:
    """Total steps of all trials, including those already recorded."""
    searched = sum(
        rung.count * (trial.config.steps - trial.since)
        for scale in range(len(plan.sizes))
        for index, rung in enumerate(plan.rungs(scale))
        for trial in plan.trials(scale, plan.settings[0], index)
    )
    target = sum(trial.config.steps for trial in plan.target(plan.settings[0])) if plan.runs_target else 0
    return searched + target
