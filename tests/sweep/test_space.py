"""Settings that a sweep tries, and their numbers of steps."""

import math

import pytest
from pydantic import TypeAdapter

from maxlm.config.sweep import Dimension, GridMethod, HalvingMethod, RandomMethod
from maxlm.sweep.space import Rung, draw_settings, halving_rungs


def dimensions(**fields) -> dict:
    return {name.replace("__", "."): TypeAdapter(Dimension).validate_python(value) for name, value in fields.items()}


def test_grid_is_every_combination_in_order():
    fields = dimensions(a=[1, "x"], b={"low": 1e-3, "high": 1e-1, "log": True, "points": 3})
    settings = draw_settings(fields, GridMethod(), integers=())
    assert settings == [{"a": a, "b": b} for a in (1, "x") for b in (1e-3, 1e-2, 1e-1)]
    linear = dimensions(b={"low": 0, "high": 1, "points": 5})
    assert [s["b"] for s in draw_settings(linear, GridMethod(), integers=())] == [0, 0.25, 0.5, 0.75, 1]


def test_integers_stay_integers_within_their_bounds():
    fields = dimensions(n={"low": 2, "high": 5, "points": 9}, x={"low": 0.123456, "high": 0.123499, "points": 3})
    grid = draw_settings(fields, GridMethod(), integers={"n"})
    assert sorted({setting["n"] for setting in grid}) == [2, 3, 4, 5]
    assert all(isinstance(setting["n"], int) for setting in grid)
    drawn = draw_settings(fields, RandomMethod(trials=30), integers={"n"})
    assert all(0.123456 <= setting["x"] <= 0.123499 for setting in (*grid, *drawn))


def test_random_settings_are_seeded_and_more_of_them_share_a_prefix():
    fields = dimensions(lr={"low": 1e-4, "high": 1e-1, "log": True}, kind=["adamw", "muon"])
    few = draw_settings(fields, RandomMethod(trials=5, seed=3), integers=())
    assert few == draw_settings(fields, RandomMethod(trials=9, seed=3), integers=())[:5]
    assert few != draw_settings(fields, RandomMethod(trials=5, seed=4), integers=())
    many = draw_settings(fields, RandomMethod(trials=400), integers=())
    assert all(1e-4 <= setting["lr"] <= 1e-1 for setting in many)
    # Log-uniform: a third in each of three decades, within four standard deviations.
    for low in (1e-4, 1e-3, 1e-2):
        share = sum(low <= setting["lr"] < 10 * low for setting in many) / len(many)
        assert abs(share - 1 / 3) < 4 * math.sqrt(2 / 9 / len(many))


def test_random_settings_are_distinct_and_choices_run_out():
    settings = draw_settings(dimensions(a=[1, 2], b=[True, False]), RandomMethod(trials=50), integers=())
    assert len(settings) == 4
    assert {tuple(setting.values()) for setting in settings} == {(1, True), (1, False), (2, True), (2, False)}


def test_without_fields_there_is_one_setting():
    assert draw_settings({}, GridMethod(), integers=()) == [{}]


@pytest.mark.parametrize(
    ("method", "count", "steps", "rungs"),
    [
        # 27 settings, R = 81 r: the bracket s = 3 of Hyperband's table 1 with eta = 3 (arXiv:1603.06560).
        (HalvingMethod(eta=3, min_steps=3, max_steps=81), 27, 5, [(27, 3), (9, 9), (3, 27), (1, 81)]),
        (HalvingMethod(eta=3, min_steps=1, max_steps=81), 27, 5, [(27, 3), (9, 9), (3, 27), (1, 81)]),
        (HalvingMethod(eta=3, min_steps=4, max_steps=81), 27, 5, [(27, 9), (9, 27), (3, 81)]),
        (HalvingMethod(eta=2, min_steps=10), 5, 100, [(5, 25), (2, 50), (1, 100)]),
        (HalvingMethod(eta=4, min_steps=30), 9, 100, [(9, 100)]),
        (HalvingMethod(eta=4, min_steps=25), 9, 100, [(9, 25), (2, 100)]),
        (HalvingMethod(eta=2, min_steps=1), 1, 100, [(1, 100)]),
    ],
)
def test_halving_ends_at_the_full_number_of_steps(method, count, steps, rungs):
    assert halving_rungs(method, count, steps) == [Rung(*rung) for rung in rungs]
