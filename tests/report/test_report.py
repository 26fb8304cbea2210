"""The report is one self-contained page of the folders' contents, with all text escaped."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from maxlm.errors import DataError, RequestError
from maxlm.report.curves import Run, view_run
from maxlm.report.report import write_comparison, write_report
from maxlm.runtime.manifest import manifest_chain, write_manifest

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checker(HTMLParser):
    """Check that elements are closed in order; collect everything that could load or run."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.scripts, self.text = [], [], 0, []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag in ("script", "iframe", "object", "embed", "link", "base", "form")
        self.scripts += sum(name.startswith("on") for name, _ in attributes)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(path) -> str:
    """Parse the page, and return its visible text."""
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.scripts == 0
    assert all(link.startswith("#") for link in checker.links)
    assert all(name.startswith("#") for name in re.findall(r"url\(([^)]*)", page))
    assert "@import" not in page
    for link in checker.links:
        assert f'id="{link[1:]}"' in page
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page)
    return " ".join(" ".join(checker.text).split())


def write_run(folder, *, steps=40, **valid):
    folder.mkdir(parents=True)
    records = [
        {
            "step": s,
            "loss": 8 / s,
            "cross_entropy": 8 / s,
            "learning_rate": 0.01,
            "tokens_per_second": 5000 + s,
            "time": s,
        }
        for s in range(1, steps + 1)
    ]
    records.append({"step": steps, "valid_loss": 1.25, **valid})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    (folder / "config.yaml").write_text("kind: train\nsteps: 40 # <i>\n")


@pytest.fixture
def quickstart(tmp_path):
    folder = tmp_path / "quick <b>start"
    (folder / "data").mkdir(parents=True)
    write_manifest(folder / "data", stage="data", inputs={}, config={"row_length": 64}, metrics={"tokens": 123456})
    write_run(folder / "pretrain", valid_bits_per_byte=1.875)
    write_manifest(
        folder / "pretrain",
        stage="train/pretrain",
        inputs={"data_0": folder / "data"},
        config={"batch_size": 4, "row_length": 64},
        metrics={"steps": 40, "seconds": 61.5},
    )
    summary = {
        "seconds": {"data": 2.5, "pretrain": 61.5},
        "tokens_per_second": 5120.0,
        "bits_per_byte": {"pretrain": {"value": 1.875, "low": 1.75, "high": 2.0}, "bigram": 2.214, "xz": 2.46},
        "sft_exact_match": {
            "before": 0.125,
            "after": 0.75,
            "interval": [0.5, 0.7],
            "by_kind": {"<script>alert(1)</script>": {"before": 0, "after": 1}},
        },
        "align_reward": {"before": -0.25, "after": 0.5, "interval": [0.6, 0.9]},
        "int8": {
            "perplexity_change": 0.00123,
            "perplexity_change_low": -0.0005,
            "perplexity_change_high": 0.003,
            "mean_kl": 0.00031,
            "bytes_float": 8.1e6,
            "bytes_int8": 2.2e6,
        },
        "chat": {
            "answers": [
                {"prompt": "<img src=x onerror=alert(2)>", "answer": "src", "reply": "fine & well", "right": False},
                {"prompt": "How many?", "answer": "2", "reply": "2", "right": True},
            ]
        },
        "checks": [
            {"name": "beats bigrams", "passed": True, "measured": "1.9 < 2.2", "remedy": "none"},
            {"name": "lifts reward", "passed": False, "measured": "by nothing", "remedy": "train <b>longer"},
        ],
        "samples": [{"stage": "pretrain", "prompt": "def ", "text": "</pre><script>alert(3)</script>"}],
        "manifest_chain": manifest_chain(folder / "pretrain"),
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def test_quickstart_report_has_its_numbers(quickstart):
    path = write_report(quickstart)
    assert path == quickstart / "report.html"
    text = check(path)
    for expected in (
        "quick <b>start",
        "1 min 04 s",
        "5,120",
        "bigram over tokens 2.214",
        "1.875",
        "1.75 to 2",
        "+62.5 points",
        "+50.0 points to +70.0 points",
        "-0.25",
        "+0.750",
        "+0.123 % (95 %: -0.050 to +0.300)",
        "8.1 MB to 2.2 MB",
        "beats bigrams 1.9 < 2.2 yes",
        "lifts reward by nothing; train <b>longer NO",
        "How many? 2 correct",
        "0.00031 nats",
        "fine & well wrong: src",
        "same hash",
        "tokens 123,456",
        "tokens per step 256",
    ):
        assert expected in text, expected


def test_external_text_is_escaped(quickstart):
    text = check(write_report(quickstart))
    for expected in ("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "</pre><script>alert(3)</script>"):
        assert expected in text


def test_report_is_deterministic(quickstart):
    first = write_report(quickstart).read_bytes()
    assert write_report(quickstart).read_bytes() == first


@pytest.mark.exhaustive
def test_any_part_may_be_missing_or_empty(quickstart):
    path = quickstart / "summary.json"
    summary = json.loads(path.read_text())
    for name in summary:
        path.write_text(json.dumps({key: value for key, value in summary.items() if key != name}))
        check(write_report(quickstart))
        for empty in (None, {}, [], "text", 3.5, {"value": None}, {"before": math.nan, "after": 1}, [None]):
            path.write_text(json.dumps({**summary, name: empty}))
            check(write_report(quickstart))
    path.write_text("{}")
    assert "Training: pretrain" in check(write_report(quickstart))


def test_report_of_a_single_run(quickstart):
    text = check(write_report(quickstart / "pretrain"))
    for expected in ("pretrain", "1.25", "1.875", "steps: 40 # <i>", "train/pretrain", "Bits per byte", "0.2"):
        assert expected in text, expected
    assert "Results" not in text


def test_goodput_chart_shows_where_the_time_went():
    goodput = {"productive": 0.6, "seconds": {"step": 60.0, "compile": 10.0, "redone_after_restart": 30.0, "x": None}}
    run = Run("run", [{"step": 1, "loss": 2.0}], {"metrics": {"attempts": 2, "goodput": goodput}})
    [chart] = view_run(run).goodput
    assert chart.note == "60.0\u00a0% of 1 min 40 s went to steps that count towards the result"
    assert ("redone after restart", "30.00", "30.0\u00a0%") in chart.numbers.rows
    assert view_run(Run("run", run.records, {"metrics": {"goodput": "odd"}})).goodput == []


def test_run_without_manifest_or_with_a_single_record(tmp_path):
    write_run(tmp_path / "run", steps=1)
    assert "Loss" in check(write_report(tmp_path / "run"))


def test_non_finite_records_are_left_out(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 2.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "2.5" in check(write_report(folder))


def test_changed_input_is_marked(quickstart):
    (quickstart / "summary.json").unlink()
    write_manifest(quickstart / "data", stage="data", inputs={}, config={}, metrics={"tokens": 99})
    assert "changed since" in check(write_report(quickstart))


def test_folder_without_anything_to_report_raises(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        write_report(tmp_path / "none")
    with pytest.raises(DataError, match="to report on"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        write_report(tmp_path)


def test_unfinished_run_says_what_is_missing(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("steps: 1000\n")
    text = check(write_report(tmp_path / "run"))
    assert "run: has not finished. The last record is of step 40 of 1,000." in text
    assert "Missing: the steps after it, the last validation, and manifest.json" in text
    stopped = {"stage": "train/pretrain", "inputs": {}, "config": {"steps": 50}}
    write_manifest(tmp_path / "run", **stopped, metrics={"steps": 40, "finished": False})
    assert "run: stopped at step 40 of 50; the same command resumes" in check(write_report(tmp_path / "run"))
    write_manifest(tmp_path / "run", **stopped, metrics={"steps": 50, "finished": True})
    assert "stopped" not in check(write_report(tmp_path / "run"))


def test_page_reloads_only_while_watched(tmp_path):
    write_run(tmp_path / "run")
    refresh = '<meta http-equiv="refresh" content="3">'
    assert refresh in write_report(tmp_path / "run", refresh_seconds=3).read_text(encoding="utf-8")
    assert "refresh" not in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_comparison_overlays_several_runs(tmp_path):
    for name, rate in (("a", 0.1), ("b <i>", 0.2)):
        write_run(tmp_path / name)
        (tmp_path / name / "config.yaml").write_text(f"steps: 40\noutput: {name}\noptim: {{learning_rate: {rate}}}\n")
    path = write_comparison([tmp_path / "a", tmp_path / "b <i>"])
    assert path == tmp_path / "a" / "compare.html"
    text = check(path)
    for expected in (
        "a and b <i>",
        "Loss, nats per token, validation",
        "optim.learning_rate 0.1 0.2",
        "a: has not finished",
    ):
        assert expected in text, expected
    assert "output" not in text
    assert "var(--one)" in path.read_text()
    assert "var(--two)" in path.read_text()


def test_runs_of_the_same_name_are_distinguished_by_path(tmp_path):
    for name in ("x", "y"):
        write_run(tmp_path / name / "run")
    text = check(write_comparison([tmp_path / "x" / "run", tmp_path / "y" / "run"]))
    assert f"{tmp_path}/x/run and {tmp_path}/y/run" in text


def test_runs_that_cannot_be_compared_raise(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="other: is not a run"):
        write_comparison([tmp_path / "run", tmp_path / "other"])
    with pytest.raises(RequestError, match="give at most 4"):
        write_comparison([tmp_path / "run"] * 5)


def test_policy_run_shows_sampled_answers_and_why_it_ended(tmp_path):
    write_run(tmp_path / "run")
    sample = {"prompt": "3+4=", "reward": 1.0, "reward_form": 0.5, "advantage": 0.7, "truncated": False}
    lines = [json.dumps({"step": step, **sample, "answer": f"<b>{step}</b>"}) for step in range(0, 100, 10)]
    (tmp_path / "run" / "samples.jsonl").write_text("\n".join([*lines, '{"step": "x"}', "{]}"]) + "\n")
    metrics = {"steps": 40, "finished": True, "stopped": "kl is 0.6, above objective.stop.largest_kl (0.5)"}
    write_manifest(tmp_path / "run", stage="train/policy", inputs={}, config={"steps": 99}, metrics=metrics)
    text = check(write_report(tmp_path / "run"))
    assert "Answers sampled during training" in text
    shown = [step for step in range(0, 100, 10) if f"<b>{step}</b>" in text]
    assert shown == [0, 50, 90]
    assert "run: ended early at step 40: kl is 0.6, above objective.stop.largest_kl (0.5)." in text
