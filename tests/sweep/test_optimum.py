"""The best value of a field, and the ranking of settings."""

import math

import pytest

from maxlm.sweep.optimum import Optimum, find_optimum
from maxlm.sweep.outcome import outcome_of, ranked
from maxlm.sweep.records import Record


def record(loss, *, seed=0, status="finished", scale=0, **setting) -> Record:
    return Record(
        id=f"{setting}{seed}",
        scale=scale,
        setting=setting,
        seed=seed,
        steps=10,
        parameters=100,
        tokens=1000,
        flops=6e5,
        status=status,
        valid={"loss": loss},
        since=0,
        seconds=1.0,
    )


def outcomes(losses: dict) -> list:
    return [outcome_of([record(loss, lr=value)], "loss") for value, loss in losses.items()]


def test_vertex_of_a_log_parabola_is_found():
    def loss(value):
        return 3 + 0.2 * (math.log(value) - math.log(4e-3)) ** 2

    found = find_optimum(outcomes({value: loss(value) for value in (1e-3, 3e-3, 1e-2, 3e-2)}), "lr")
    assert found.value == pytest.approx(4e-3, rel=1e-6)
    assert not found.at_edge


def test_values_far_from_the_optimum_do_not_move_it():
    def loss(value):
        return 3 + 0.2 * (math.log(value / 4e-3)) ** 2

    losses = {value: loss(value) for value in (1e-3, 3e-3, 1e-2)} | {0.1: 9.0, 0.3: 50.0, 1.0: 7.0}
    assert find_optimum(outcomes(losses), "lr").value == pytest.approx(4e-3, rel=1e-6)


def test_best_value_at_the_edge_is_flagged():
    assert find_optimum(outcomes({1e-3: 3.0, 1e-2: 3.5, 1e-1: 4.0}), "lr") == Optimum(1e-3, True)
    assert find_optimum(outcomes({1e-3: 5.0, 1e-2: 4.5, 1e-1: 4.0}), "lr") == Optimum(1e-1, True)


def test_best_of_several_settings_with_the_same_value_counts():
    found = [outcome_of([record(loss, lr=lr, other=o)], "loss") for lr, o, loss in
             [(1e-3, 1, 9), (1e-3, 2, 4), (1e-2, 1, 3), (1e-2, 2, 8), (1e-1, 1, 4)]]  # fmt: skip
    assert find_optimum(found, "lr").value == pytest.approx(1e-2)


def test_maximization():
    assert find_optimum(outcomes({1e-3: 0.1, 1e-2: 0.9, 1e-1: 0.1}), "lr", sign=-1).value == pytest.approx(1e-2)


@pytest.mark.parametrize("values", [{0.0: 1.0, 0.1: 2.0}, {"adamw": 1.0}, {True: 1.0}])
def test_values_without_a_logarithm_have_no_optimum(values):
    assert find_optimum(outcomes(values), "lr") is None


def test_outcome_is_the_mean_over_seeds_and_needs_all_of_them():
    whole = outcome_of([record(3.0, seed=0, lr=1), record(4.0, seed=1, lr=1)], "loss")
    half = outcome_of([record(1.0, seed=0, lr=2), record(None, seed=1, lr=2, status="diverged")], "loss")
    assert whole.value == 3.5
    assert half.value is None
    other = outcome_of([record(3.0, lr=3)], "loss")
    assert [o.setting["lr"] for o in ranked([whole, half, other], "minimize")] == [3, 1]
    assert [o.setting["lr"] for o in ranked([whole, half, other], "maximize")] == [1, 3]
