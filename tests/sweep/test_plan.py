"""Validation of a sweep before anything runs, names of trials, and dry runs."""

import json

import pytest

from maxlm.cli import main
from maxlm.config import load_config
from maxlm.errors import ConfigError, DataError
from maxlm.sweep.forecast import forecast
from maxlm.sweep.records import Records
from maxlm.sweep.trials import Plan, is_prefix

MIXER = "model.layers.mixer"
RATES = {"optim.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True, "points": 3}}


def test_all_mistakes_in_fields_and_sizes_are_reported_with_the_nearest_name(sweep_of):
    config = sweep_of(
        fields={"optim.lerning_rate": [0.1], "batch_size": [0], "optim.kind": ["adamv"]},
        scales={"ladder": [{"modle.embed_dim": 8}, {"model.embed_dim": 16}, {"model.embed_dim": -4}]},
    )
    with pytest.raises(ConfigError) as error:
        Plan(config)
    problems = [problem.removeprefix(f"{config.train} as the sweep changes it: ") for problem in error.value.problems]
    assert len(problems) == 5
    for start in (
        "optim.lerning_rate: unknown key; did you mean learning_rate?",
        "batch_size: 0: must be a whole number from 1 to",
        "optim.kind: 'adamv': must be",
        "modle: unknown key; did you mean model?",
        "model.embed_dim: -4: must be",
    ):
        assert any(text.startswith(start) for text in problems), problems


def test_values_that_are_valid_only_together_are_accepted(sweep_of):
    # Four key/value heads are invalid with the file's two heads.
    plan = Plan(sweep_of(fields={f"{MIXER}.num_kv_heads": [4], f"{MIXER}.num_heads": [4, 8]}))
    assert len(plan.settings) == 2
    with pytest.raises(ConfigError, match=r"num_heads \(2\) must be a multiple of num_kv_heads \(4\)"):
        Plan(sweep_of(fields={f"{MIXER}.num_kv_heads": [1, 4]}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "fields must name the settings to vary"),
        ({"fields": RATES, "overrides": {"optim": {"learning_rate": 1}}}, "learning_rate: is also varied by fields"),
        ({"fields": {"output": ["a"]}}, "fields.output: is set by the sweep itself"),
        ({"fields": {"seed": [1]}, "seeds": [1]}, "fields.seed: is set by the sweep itself"),
        ({"fields": {"x": {"low": 2, "high": 1}}}, r"low \(2.0\) must be less than high \(1.0\)"),
        ({"fields": {"x": {"low": 0, "high": 1, "log": True}}}, "must be above 0 if log is true"),
        ({"fields": {"x": {"hgh": 1, "low": 0}}}, "fields.x.hgh: unknown key; did you mean high"),
        ({"fields": {"x": []}}, "fields.x: .*at least 1 item"),
        ({"fields": RATES, "goal": "maximize", "scales": {"ladder": [{}, {}, {}]}}, "scales need goal: minimize"),
        ({"scales": {"ladder": [{"steps": 1}]}}, "scales.ladder: .*at least 3 items"),
        (
            {"fields": {"steps": [1, 2]}, "method": {"kind": "successive_halving", "min_steps": 1}},
            "fields.steps: is set by the sweep itself",
        ),
        (
            {"fields": RATES, "method": {"kind": "successive_halving", "min_steps": 9, "max_steps": 3}},
            r"min_steps \(9\) exceeds max_steps \(3\)",
        ),
    ],
)
def test_invalid_sweep_raises(sweep_of, settings, message):
    with pytest.raises(ConfigError, match=message):
        sweep_of(**settings)


def test_sizes_must_increase(sweep_of):
    ladder = [{"steps": 4}, {"steps": 3}, {"steps": 5}]
    with pytest.raises(ConfigError, match="scales: flops must increase"):
        Plan(sweep_of(scales={"ladder": ladder}))


def test_nested_sections_and_command_line_overrides_merge_with_dotted_keys(tmp_path, train_file):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"kind: sweep\noutput: {tmp_path}/out\ntrain: {train_file}\n"
        "fields:\n  optim.learning_rate: {low: 1.0e-3, high: 1.0e-1, log: true}\n  optim: {beta2: [0.9, 0.99]}\n"
        "overrides: {optim: {schedule: {warmup_steps: 3}}}\n"
    )
    config = load_config(path, ["fields.optim.learning_rate.points=2", "overrides.steps=7"], kind="sweep")
    assert set(config.fields) == {"optim.learning_rate", "optim.beta2"}
    assert config.fields["optim.learning_rate"].points == 2
    assert config.overrides == {"optim.schedule.warmup_steps": 3, "steps": 7}
    trial = Plan(config).trials(0, {"optim.learning_rate": 0.5}, 0)[0]
    assert (trial.config.optim.schedule.warmup_steps, trial.config.steps) == (3, 7)
    assert trial.config.optim.learning_rate == 0.5


def test_trial_name_depends_only_on_what_it_trains(sweep_of):
    def names(**settings):
        plan = Plan(sweep_of(fields=RATES, **settings))
        return [trial.id for setting in plan.settings for trial in plan.trials(0, setting, 0)]

    first = names()
    assert len(set(first)) == 3
    assert names(metric="bits_per_byte") == first
    assert not set(names(overrides={"steps": 5})) & set(first)
    assert set(names(seeds=[0, 1])) > set(first)


@pytest.mark.parametrize(
    ("schedule", "prefix"),
    [
        ({"kind": "constant", "warmup_steps": 3}, True),
        ({"kind": "inverse_sqrt"}, True),
        ({"kind": "cosine"}, False),
        ({"kind": "wsd", "decay_fraction": 0.2}, False),
        ({"kind": "wsd", "decay_fraction": 0.0}, True),
    ],
)
def test_schedule_that_depends_on_the_last_step_is_not_a_prefix(sweep_of, schedule, prefix):
    plan = Plan(sweep_of(fields=RATES, overrides={"optim.schedule": schedule}))
    config = plan.trials(0, plan.settings[0], 0)[0].config
    assert is_prefix(config, 30, 90) == prefix
    method = {"kind": "successive_halving", "trials": 4, "eta": 2, "min_steps": 30, "max_steps": 120}
    plan = Plan(sweep_of(fields=RATES, overrides={"optim.schedule": schedule}, method=method))
    rounds = [plan.trials(0, plan.settings[0], index)[0] for index in range(3)]
    assert [trial.config.steps for trial in rounds] == [30, 60, 120]
    assert [trial.since for trial in rounds] == ([0, 30, 60] if prefix else [0, 0, 0])
    assert len({trial.id for trial in rounds}) == (1 if prefix else 3)


def test_dry_run_counts_the_remaining_work_and_writes_nothing(sweep_of):
    method = {"kind": "successive_halving", "trials": 4, "eta": 2, "min_steps": 2, "max_steps": 8}
    config = sweep_of(fields=RATES, method=method, seeds=[0, 1])
    found = forecast(config)
    plan = Plan(config)
    # Rounds of 4, 2 and 1 settings to 2, 4 and 8 steps, each continuing the previous one, with two seeds.
    assert found["steps"] == 2 * (4 * 2 + 2 * 2 + 1 * 4)
    size = plan.trials(0, plan.settings[0], 0)[0].size
    assert found["flops"] == pytest.approx(6 * size.parameters * found["steps"] * 8 * 32)
    assert found["seconds"] is None
    assert [trial["setting"] is None for trial in found["trials"]] == [False] * 8 + [True] * 6
    assert not plan.folder.exists()


def test_command_lists_trials_or_reports_mistakes(tmp_path, train_file, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"kind: sweep\noutput: {tmp_path}/out\ntrain: {train_file}\nfields: {{optim.learning_rate: [0.01, 0.02]}}\n"
    )
    assert main(["sweep", str(path), "--dry-run"]) == 0
    assert "2 trials, 0 of them done; to do: 8 steps" in capsys.readouterr().out
    assert main(["sweep", str(path), "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 2
    assert main(["sweep", str(path), "fields.optim.beta3=[1]"]) == 2
    assert "did you mean beta2?" in capsys.readouterr().err
    assert main(["sweep", str(path), "train=nowhere.yaml"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(["sweep", str(path), "output=gs://bucket/x"]) == 2
    assert "must be a local folder" in capsys.readouterr().err
    assert main(["sweep", str(train_file)]) == 2
    assert "this command needs kind: sweep" in capsys.readouterr().err


def test_truncated_record_is_dropped_and_an_invalid_one_raises(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"id": "a", "sca')
    assert list(Records(path)) == []
    path.write_text("{}\n")
    with pytest.raises(DataError, match="line 1: is not a record of a trial"):
        Records(path)
