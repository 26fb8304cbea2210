"""Laws, prediction, best configuration and page from trials whose results follow a known law."""

import json
import math
import re
from dataclasses import replace

import pytest

from maxlm.config import dump_yaml, load_config
from maxlm.sweep.analysis import analyse, best_config
from maxlm.sweep.outcome import outcome_of
from maxlm.sweep.page import write_sweep_page
from maxlm.sweep.records import Record
from maxlm.sweep.trials import TARGET, Plan

LADDER = [
    {"model": {"embed_dim": 8}, "steps": 4},
    {"model.embed_dim": 16, "steps": 8},
    {"model.embed_dim": 24, "steps": 12},
    {"model.embed_dim": 40, "steps": 20},
]
SCALES = {"ladder": LADDER, "target": {"model.embed_dim": 64, "steps": 40}}
FIELDS = {
    "optim.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True, "points": 5},
    "optim.kind": ["adamw", "muon"],
    "batch_size": [8, 16],
}


def best_rate(flops: float) -> float:
    return 0.01 * (flops / 1e9) ** -0.1


def true_loss(trial) -> float:
    """2 + C^-0.3, plus penalties if the learning rate, optimizer or batch is not the best."""
    miss = math.log(trial.setting["optim.learning_rate"] / best_rate(trial.size.flops))
    worse = 0.1 * (trial.setting["optim.kind"] == "muon")
    return 2 + 3 * (trial.size.flops / 1e9) ** -0.3 + 0.02 * miss**2 + worse


def record(trial, loss: float, *, status: str = "finished") -> Record:
    config, size = trial.config, trial.size
    return Record(
        id=trial.id,
        scale=trial.scale,
        setting=trial.setting,
        seed=config.seed,
        steps=config.steps,
        parameters=size.parameters,
        tokens=size.tokens,
        flops=size.flops,
        status=status,
        valid={"loss": loss} if status == "finished" else {},
        since=trial.since,
        seconds=2.0,
        error=None if status == "finished" else "was killed by signal 9",
    )


def outcomes(plan: Plan) -> list:
    groups = [plan.trials(scale, setting, 0) for scale in range(len(plan.sizes)) for setting in plan.settings]
    return [outcome_of([record(trial, true_loss(trial)) for trial in group], "loss") for group in groups]


@pytest.fixture(scope="module")
def plan(sweep_of) -> Plan:
    fields = {name: FIELDS[name] for name in ("optim.learning_rate", "optim.kind")}
    return Plan(sweep_of(scales=SCALES, fields=fields))


@pytest.fixture(scope="module")
def analysis(plan):
    return analyse(plan, outcomes(plan))


def test_law_and_optimum_are_recovered_and_extrapolated_to_the_target(plan, analysis):
    assert analysis.law.irreducible == pytest.approx(2, rel=0.02)
    assert analysis.law.exponent == pytest.approx(0.3, rel=0.03)
    [field] = analysis.field_laws
    assert field.name == "optim.learning_rate"
    assert field.law.exponent == pytest.approx(-0.1, abs=0.01)
    prediction = analysis.prediction
    assert prediction.setting["optim.kind"] == "adamw"
    assert prediction.setting["optim.learning_rate"] == pytest.approx(best_rate(prediction.size.flops), rel=0.03)
    assert prediction.value == pytest.approx(2 + 3 * (prediction.size.flops / 1e9) ** -0.3, rel=0.01)
    assert prediction.low < prediction.value < prediction.high


def test_size_counts_parameters_tokens_and_flops(plan):
    [trial] = plan.trials(1, plan.settings[0], 0)
    # Tied table, one layer of attention (2 + 1 + 1 heads of 8, and out) and MLP (3), norms.
    width, vocabulary = 16, 400
    layer = width * 8 * (2 + 1 + 1) + 2 * 8 * width + 3 * width * 32 + 2 * width
    assert trial.size.parameters == vocabulary * width + layer + width
    assert trial.size.tokens == 8 * 8 * 32
    assert trial.size.flops == 6 * trial.size.parameters * trial.size.tokens


def test_best_configuration_is_the_target_with_the_predicted_setting(plan, analysis, tmp_path):
    config = best_config(plan, analysis)
    assert config.output == str(plan.folder / "best")
    assert (config.model.embed_dim, config.steps) == (64, 40)
    assert config.optim.learning_rate == analysis.prediction.setting["optim.learning_rate"]
    path = tmp_path / "best.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path, kind="train") == config


def test_best_configuration_without_sizes_is_the_best_trial(sweep_of):
    plan = Plan(
        sweep_of(fields={"optim.learning_rate": [0.001, 0.01]}, overrides={"optim.kind": "adamw"}, seeds=[3, 5])
    )
    [first, second] = ([*plan.trials(0, setting, 0)] for setting in plan.settings)
    found = [
        outcome_of([record(first[0], 3.0), record(first[1], 3.2)], "loss"),
        outcome_of([record(second[0], 2.0), record(second[1], 0.0, status="diverged")], "loss"),
    ]
    analysis = analyse(plan, found)
    assert analysis.law is None
    config = best_config(plan, analysis)
    assert (config.optim.learning_rate, config.seed, config.steps) == (0.001, 3, 4)
    assert analysis.best.value == pytest.approx(3.1)


def test_integer_fields_stay_integers_under_a_law(sweep_of):
    plan = Plan(sweep_of(scales=SCALES, fields={"batch_size": [8, 16, 32]}, overrides={"optim.learning_rate": 0.01}))
    found = [
        outcome_of([record(trial, 2 + 3 * (trial.size.flops / 1e9) ** -0.3)], "loss")
        for scale in range(4)
        for setting in plan.settings
        for trial in plan.trials(scale, setting, 0)
    ]
    assert isinstance(analyse(plan, found).prediction.setting["batch_size"], int)


def test_notes_name_the_limits_of_the_analysis(sweep_of):
    plan = Plan(sweep_of(scales={**SCALES, "ladder": LADDER[:3]}, fields={"optim.learning_rate": [0.001, 0.1]}))
    found = []
    for scale in range(3):
        for setting in plan.settings:
            [trial] = plan.trials(scale, setting, 0)
            found.append(outcome_of([record(trial, 3.0 - 0.1 * scale + setting["optim.learning_rate"])], "loss"))
    analysis = analyse(plan, found)
    assert any("edge of the tried range" in note for note in analysis.notes)
    assert any("nothing to estimate the noise from" in note for note in analysis.notes)
    assert analysis.prediction.low is None


def test_summary_is_json_with_prediction_and_measurement(plan, analysis):
    [target] = plan.target(analysis.prediction.setting)
    measured = replace(analysis, measured=outcome_of([record(target, 2.5)], "loss"))
    summary = json.loads(json.dumps(measured.summary(plan)))
    assert summary["trials"] == {"finished": 41, "diverged": 0, "failed": 0}
    assert summary["measured"]["value"] == 2.5
    assert summary["seconds"] == 82
    size, x, predicted, result = summary["sizes"][-1]
    assert "predicted" in size
    assert float(x) == pytest.approx(target.size.flops, rel=0.01)
    assert predicted.startswith(f"{analysis.prediction.value:.4f} [")
    assert result == "2.5000"


def test_page_shows_points_law_band_target_and_every_trial(plan, analysis, tmp_path):
    [target] = plan.target(analysis.prediction.setting)
    measured = replace(analysis, measured=outcome_of([record(target, 2.5)], "loss"))
    write_sweep_page(tmp_path / "index.html", plan, measured)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    law = re.search(r"<svg.*?</svg>", page, re.DOTALL)[0]
    # Four sizes, the predicted target, the measured one, the band; the target's interval.
    assert law.count("<use") == 4 + 1 + 1 + 1
    assert law.count("fill: var(--one); fill-opacity: 0.16") == 1
    assert law.count("stroke: var(--text)") == 1
    for outcome in measured.outcomes:
        assert outcome.records[0].id in page
    assert "predicted" in page
    assert plan.label(TARGET) in page
    assert "http" not in re.sub(r"http-equiv", "", page)


def test_page_shows_a_failed_trials_error_with_markup_escaped(sweep_of, tmp_path):
    plan = Plan(sweep_of(fields={"optim.learning_rate": [0.001, 0.01, 0.1]}))
    groups = [plan.trials(0, setting, 0)[0] for setting in plan.settings]
    found = [outcome_of([record(trial, 3.0 + index)], "loss") for index, trial in enumerate(groups[:2])]
    broken = replace(record(groups[2], 0.0, status="failed"), error="<b>out of memory</b>")
    write_sweep_page(tmp_path / "index.html", plan, analyse(plan, [*found, outcome_of([broken], "loss")]))
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;out of memory" in page
    assert "1 failed" in page
