"""Intervals have nominal coverage, and use pairing."""

import math

import numpy as np
import pytest

from maxlm.core.interval import mean_interval, paired_difference, proportion_interval, ratio_interval, wilson_interval


def coverage(draw, truth: float, interval, repetitions: int = 300) -> float:
    generator = np.random.default_rng(7)
    hits = 0
    for seed in range(repetitions):
        found = interval(*draw(generator), seed=seed)
        hits += found.low <= truth <= found.high
    return hits / repetitions


# 300 repetitions of a 95 % interval: four standard deviations are 5 %.
@pytest.mark.parametrize(
    ("draw", "truth", "interval"),
    [
        (lambda g: (g.normal(3.0, 2.0, 80),), 3.0, mean_interval),
        (lambda g: (g.exponential(1.5, 150),), 1.5, mean_interval),
        (lambda g: (g.random(100) < 0.3,), 0.3, proportion_interval),
    ],
    ids=["normal", "exponential", "share"],
)
def test_interval_of_a_mean_has_nominal_coverage(draw, truth, interval):
    assert 0.90 <= coverage(draw, truth, interval) <= 0.99


def test_interval_of_a_ratio_of_sums_has_nominal_coverage():
    def documents(generator):
        sizes = generator.lognormal(3, 1, 150)
        return sizes * generator.normal(2.0, 0.3, 150), sizes

    # Long documents weigh more: the true value is 2 bits per byte.
    assert 0.90 <= coverage(documents, 2.0, ratio_interval) <= 0.99


def test_ratio_is_of_sums_not_a_mean_of_ratios():
    assert ratio_interval(np.array([1.0, 90.0]), np.array([1.0, 30.0])).value == pytest.approx(91 / 31)


def test_interval_width_matches_theory():
    values = np.random.default_rng(0).normal(0, 1, 400)
    found = mean_interval(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_same_seed_gives_the_same_interval():
    values = np.arange(30.0)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_pairing_detects_a_small_gain_that_separate_intervals_hide():
    generator = np.random.default_rng(1)
    before = generator.normal(0, 5, 100)
    after = before + generator.normal(0.5, 0.2, 100)
    difference = paired_difference(before, after)
    assert 0.4 < difference.low < difference.value < difference.high < 0.6
    separate = mean_interval(before), mean_interval(after)
    assert separate[0].high > separate[1].low


def test_weights_give_a_difference_of_ratios():
    before, after, size = np.array([10.0, 40.0]), np.array([8.0, 44.0]), np.array([5.0, 20.0])
    assert paired_difference(before, after, weights=size).value == pytest.approx(52 / 25 - 50 / 25)


def test_all_correct_has_a_nonzero_interval():
    found = proportion_interval(np.ones(20))
    assert found.value == 1.0
    # Wilson at the edge: n / (n + z^2).
    assert found.low == pytest.approx(20 / (20 + 1.959964**2))
    assert found.high == 1.0
    assert [proportion_interval(np.zeros(n)).low for n in (1, 20, 200)] == [0.0, 0.0, 0.0]


def test_wilson_interval_solves_its_equation():
    found = wilson_interval(7, 25)
    for bound in found.bounds:
        assert abs(7 / 25 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 25), rel=1e-5)


def test_single_unit_has_no_interval():
    assert mean_interval(np.array([4.0])).bounds == (None, None)


def test_map_of_an_increasing_function_keeps_the_order():
    found = mean_interval(np.arange(10.0)).map(math.exp)
    assert found.low < found.value < found.high


def test_mismatched_lists_are_rejected():
    with pytest.raises(ValueError, match="same units"):
        paired_difference(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="sum to zero"):
        ratio_interval(np.ones(3), np.zeros(3))
