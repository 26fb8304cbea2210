"""One self-contained HTML page about a run, or about a whole pipeline of runs."""

import json
from html import escape
from pathlib import Path
from typing import Any

from maxlm.errors import DataError
from maxlm.eval.html_parts import (
    duration,
    folded,
    paragraph,
    percent,
    section,
    tiles,
    to_dict,
    to_interval,
    to_list,
    to_number,
    write_page,
)
from maxlm.eval.report_chain import chain_section
from maxlm.eval.report_runs import Run, last_value, run_section
from maxlm.eval.report_story import (
    chat_section,
    checks_section,
    int8_section,
    references,
    results_section,
    samples_section,
)
from maxlm.eval.svg import format_number
from maxlm.runtime.manifest import FILE_NAME, manifest_chain, read_manifest
from maxlm.train.metrics import read_metrics

SUMMARY = "summary.json"


def write_report(folder: str | Path) -> Path:
    """Write `folder/report.html` and return its path.

    A folder with `summary.json` gives the whole story of its stages, a run folder that of the run. What is missing is
    left out.

    Raises:
      DataError: the folder is missing, or holds nothing to report on.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give a run folder or a quickstart folder")
    summary, runs = _read_summary(folder), _read_runs(folder)
    chain = [item for item in to_list(summary.get("manifest_chain")) if isinstance(item, dict)] or _chain(folder)
    if not (summary or runs or chain):
        raise DataError(f"{folder}: holds no {SUMMARY}, no run with metrics.jsonl and no {FILE_NAME} to report on")

    name = folder.resolve().name
    parts = [
        f"<h1>{escape(name)}</h1>",
        _headline(summary, runs),
        checks_section(summary),
        results_section(summary),
        chat_section(summary),
        samples_section(summary),
        *(run_section(run, references=references(summary)) for run in runs),
        int8_section(summary),
        _config_section(folder),
        chain_section(chain, folder),
    ]
    path = folder / "report.html"
    write_page(path, f"{name} - maxlm report", parts)
    return path


def _headline(summary: dict[str, Any], runs: list[Run]) -> str:
    """The few figures that are read first."""
    if not summary:
        return _run_headline(runs[0]) if len(runs) == 1 else ""
    items = []
    seconds = [number for value in to_dict(summary.get("seconds")).values() if (number := to_number(value)) is not None]
    if seconds:
        items.append((duration(sum(seconds)), "from raw text to the end"))
    if rate := to_number(summary.get("tokens_per_second")):
        items.append((f"{rate:,.0f}", "tokens a second in pretraining"))
    bits = to_dict(summary.get("bits_per_byte"))
    if model := to_interval(bits.get("pretrain")):
        bigram = to_interval(bits.get("bigram"))
        what = "bits per byte, held out" + (f" (bigram: {bigram.value:.2f})" if bigram else "")
        items.append((f"{model.value:.3f}", what))
    for key, what, told in (
        ("sft_exact_match", "right answers, by fine-tuning", percent),
        ("align_reward", "reward, by alignment", lambda value: f"{value:.2f}"),
    ):
        before, after = (to_interval(to_dict(summary.get(key)).get(when)) for when in ("before", "after"))
        if before and after:
            items.append((f"{told(before.value)} → {told(after.value)}", what))
    if (change := to_number(to_dict(summary.get("int8")).get("perplexity_change"))) is not None:
        items.append((f"{100 * change:+.2f} %", "perplexity, by int8"))
    subtitle = paragraph("From raw text to a served chat model: what each stage did, and what it was made from.")
    return subtitle + tiles(items)


def _run_headline(run: Run) -> str:
    metrics = to_dict(run.manifest.get("metrics"))
    items = []
    for name, what in (
        ("loss", "training loss"),
        ("valid_loss", "validation loss"),
        ("valid_bits_per_byte", "bits per byte"),
    ):
        if (value := last_value(run, name)) is not None:
            items.append((format_number(value), what))
    if rate := to_number(metrics.get("tokens_per_second")):
        items.append((f"{rate:,.0f}", "tokens a second"))
    if seconds := to_number(metrics.get("seconds")):
        items.append((duration(seconds), "of training"))
    return tiles(items)


def _config_section(folder: Path) -> str:
    path = folder / "config.yaml"
    return (
        section("Configuration", folded("config.yaml", path.read_text(encoding="utf-8", errors="replace")))
        if path.is_file()
        else ""
    )


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not valid JSON; run the quickstart again, or remove the file") from None
    return to_dict(summary)


def _read_runs(folder: Path) -> list[Run]:
    """The folder itself, if it is a run, and the runs right below it, in the order of their first records."""
    found = []
    for path in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        if records := [record for record in read_metrics(path) if isinstance(record, dict)]:
            manifest = read_manifest(path) if (path / FILE_NAME).is_file() else {}
            found.append(Run(path.resolve().name, records, manifest))
    return sorted(found, key=lambda run: to_number(run.records[0].get("time")) or 0.0)


def _chain(folder: Path) -> list[dict[str, Any]]:
    """The manifests under the folder and all that they stand on, each once, inputs first."""
    found: dict[str, dict] = {}
    for path in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        for item in manifest_chain(path):
            found.setdefault(item["folder"], item)
    return list(found.values())
