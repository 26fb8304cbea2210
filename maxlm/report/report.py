"""Self-contained HTML report of a run, a pipeline of runs, or a comparison of several runs."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from maxlm.errors import DataError, RequestError
from maxlm.report.chain import view_chain
from maxlm.report.compare import MAX_RUNS, differing_settings, view_comparison
from maxlm.report.curves import Run, view_run
from maxlm.report.page import write_page
from maxlm.report.story import headline, references, view_story
from maxlm.report.text import duration, format_number, to_dict, to_list, to_number
from maxlm.runtime.manifest import FILE_NAME, manifest_chain, read_manifest
from maxlm.runtime.storage import read_lines, storage_path
from maxlm.train.metrics import read_metrics

SUMMARY = "summary.json"
PAGE, COMPARISON = "report.html", "compare.html"


def write_report(folder: str | Path, *, refresh_seconds: int = 0) -> Path:
    """Write `folder/report.html` and return its path.

    A folder with `summary.json` gives a report of all its stages, a run folder one of the run. Missing parts are
    named, and the rest is shown.

    Args:
      refresh_seconds: how often the browser reloads the page; 0: never.

    Raises:
      DataError: the folder is missing, or has nothing to report on.
    """
    folder = _existing(folder)
    summary, runs = _read_summary(folder), _read_runs(folder)
    chain = [item for item in to_list(summary.get("manifest_chain")) if isinstance(item, dict)] or _chain(folder)
    if not (summary or runs or chain):
        raise DataError(f"{folder}: has no {SUMMARY}, no run with metrics.jsonl and no {FILE_NAME} to report on")
    name, config = folder.resolve().name, folder / "config.yaml"
    path = folder / PAGE
    write_page(
        path,
        "report.html",
        title=f"{name} - maxlm report",
        name=name,
        missing=[sentence for run in runs if (sentence := unfinished(run))],
        headline=headline(summary) if summary else _run_headline(runs[0]) if len(runs) == 1 else [],
        story=view_story(summary) if summary else None,
        runs=[view_run(run, references=references(summary)) for run in runs],
        differences=None,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        chain=view_chain(chain, folder),
        refresh_seconds=refresh_seconds,
    )
    return path


def write_comparison(folders: Sequence[str | Path], *, refresh_seconds: int = 0) -> Path:
    """Write `compare.html` into the first folder: overlaid curves of several runs.

    Raises:
      DataError: a folder is missing, or is not a run with logged metrics.
      RequestError: there are more runs than a chart can show.
    """
    if len(folders) > MAX_RUNS:
        raise RequestError(f"{len(folders)} runs are more than one chart can show; give at most {MAX_RUNS}")
    runs = []
    for folder in map(_existing, folders):
        if (run := _read_run(folder)) is None:
            raise DataError(f"{folder}: is not a run: it has no metrics.jsonl; give run folders of `maxlm train`")
        runs.append(run)
    runs = _with_distinct_names(runs, folders)
    path = Path(folders[0]) / COMPARISON
    names = " and ".join(run.name for run in runs)
    write_page(
        path,
        "report.html",
        title=f"{names} - maxlm report",
        name=names,
        missing=[sentence for run in runs if (sentence := unfinished(run))],
        headline=[],
        story=None,
        runs=[view_comparison(runs)],
        differences=differing_settings(runs),
        config="",
        chain=[],
        refresh_seconds=refresh_seconds,
    )
    return path


def unfinished(run: Run) -> str:
    """A sentence on what an unfinished run lacks; empty if it has finished."""
    metrics = to_dict(run.manifest.get("metrics"))
    if metrics.get("stopped"):
        return f"{run.name}: ended early at step {run.records[-1].get('step')}: {metrics['stopped']}."
    if metrics.get("finished", bool(run.manifest)):
        return ""
    step, steps = run.records[-1].get("step"), to_number(run.config.get("steps"))
    of = f" of {steps:,.0f}" if steps else ""
    if run.manifest:
        return f"{run.name}: stopped at step {step}{of}; the same command resumes from there."
    logged = to_number(run.records[-1].get("time"))
    when = f", logged at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(logged))}" if logged else ""
    return (
        f"{run.name}: has not finished. The last record is of step {step}{of}{when}. Missing: the steps after it,"
        f" the last validation, and {FILE_NAME} with the totals. If it is not running, the same command resumes it."
    )


def have_finished(folder: Path) -> bool:
    """Whether all runs of a folder have finished."""
    runs = _read_runs(folder)
    return bool(runs) and not any(unfinished(run) for run in runs)


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give a run folder or a quickstart folder")
    return folder


def _run_headline(run: Run) -> list[tuple[str, str]]:
    metrics = to_dict(run.manifest.get("metrics"))
    named = (("loss", "training loss"), ("valid_loss", "validation loss"), ("valid_bits_per_byte", "bits per byte"))
    items = [(format_number(value), what) for name, what in named if (value := run.last(name)) is not None]
    if rate := to_number(metrics.get("tokens_per_second")) or run.last("tokens_per_second"):
        items.append((f"{rate:,.0f}", "tokens per second"))
    if seconds := to_number(metrics.get("seconds")):
        items.append((duration(seconds), "of training"))
    return items


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    if not path.is_file():
        return {}
    try:
        return to_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not valid JSON; run the quickstart again, or delete the file") from None


def _read_runs(folder: Path) -> list[Run]:
    """The folder itself, if it is a run, and the runs directly in it, in the order of their first records."""
    found = [run for path in _folders(folder) if (run := _read_run(path))]
    return sorted(found, key=lambda run: to_number(run.records[0].get("time")) or 0.0)


def _read_run(folder: Path) -> Run | None:
    records = [record for record in read_metrics(folder) if isinstance(record, dict)]
    if not records:
        return None
    manifest = read_manifest(folder) if (folder / FILE_NAME).is_file() else {}
    config = to_dict(manifest.get("config")) or _read_config(folder)
    return Run(folder.resolve().name, records, manifest, config, _read_samples(folder))


def _read_samples(folder: Path) -> list[dict[str, Any]]:
    samples = []
    for line in read_lines(storage_path(folder) / "samples.jsonl"):
        try:
            samples.append(to_dict(json.loads(line)))
        except (ValueError, RecursionError):
            continue
    return samples


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run, not validated: another version of maxlm may have trained it."""
    try:
        return to_dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _chain(folder: Path) -> list[dict[str, Any]]:
    """The manifests under the folder and all their inputs' manifests, each once, inputs first."""
    found: dict[str, dict] = {}
    for path in _folders(folder):
        for item in manifest_chain(path):
            found.setdefault(item["folder"], item)
    return list(found.values())


def _folders(folder: Path) -> list[Path]:
    return [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]


def _with_distinct_names(runs: list[Run], folders: Sequence[str | Path]) -> list[Run]:
    """Runs whose folders have the same name are distinguished by their paths."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [replace(run, name=str(folder)) for run, folder in zip(runs, folders)]
