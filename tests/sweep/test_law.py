"""Laws: exact on exact points, calibrated intervals, deterministic."""

import numpy as np
import pytest
from scipy import stats

from maxlm.sweep.law import _jacobian, _log_loss, fit_power_law, fit_scaling_law

X = np.geomspace(1e12, 1e15, 6)
E, A, ALPHA = 1.69, 5e3, 0.29


def law(x):
    return E + A * np.asarray(x) ** -ALPHA


@pytest.mark.parametrize(("irreducible", "coefficient", "exponent"), [(E, A, ALPHA), (0.9, 406.4, 0.15), (2, 3e8, 0.7)])
def test_exact_law_is_recovered(irreducible, coefficient, exponent):
    fit = fit_scaling_law(X, irreducible + coefficient * X**-exponent, resamples=1)
    assert fit.irreducible == pytest.approx(irreducible, rel=1e-4)
    assert fit.coefficient == pytest.approx(coefficient, rel=1e-2)
    assert fit.exponent == pytest.approx(exponent, rel=1e-3)
    assert fit.loss(1e17) == pytest.approx(irreducible + coefficient * 1e17**-exponent, rel=1e-4)


def test_fit_does_not_depend_on_the_unit_of_size():
    noisy = law(X) * np.exp(0.01 * np.sin(np.arange(6)))
    one, other = (fit_scaling_law(unit * X, noisy, resamples=20) for unit in (1.0, 1e-12))
    assert one.exponent == pytest.approx(other.exponent, rel=1e-6)
    assert one.loss(1e16) == pytest.approx(other.loss(1e4), rel=1e-6)
    np.testing.assert_allclose(one.band(1e16), other.band(1e4), rtol=1e-6)


def test_jacobian_matches_the_law():
    parameters, log_u, step = np.array([0.3, -0.2, 0.4]), np.linspace(-3, 3, 5), 1e-6
    numeric = [
        (_log_loss(parameters + step * unit, log_u) - _log_loss(parameters - step * unit, log_u)) / (2 * step)
        for unit in np.eye(3)
    ]
    np.testing.assert_allclose(_jacobian(parameters, log_u), np.stack(numeric, axis=1), atol=1e-8)


def test_fit_is_robust_to_an_outlier():
    # One of ten points is 20% too high. Log least squares would be off five times as far.
    x = np.geomspace(1e12, 1e15, 10)
    loss = law(x)
    loss[6] *= 1.2
    robust = fit_scaling_law(x, loss, resamples=1)
    squares = fit_scaling_law(x, loss, delta=10.0, resamples=1)
    true = law(1e16)
    assert abs(robust.loss(1e16) / true - 1) < 0.01
    assert abs(squares.loss(1e16) / true - 1) > 5 * abs(robust.loss(1e16) / true - 1)


def test_interval_has_its_nominal_coverage():
    generator = np.random.default_rng(0)
    hits, target = 0, 4e15
    for trial in range(16):
        noisy = law(X) * np.exp(0.005 * generator.standard_normal(len(X)))
        value, low, high = fit_scaling_law(X, noisy, resamples=40, seed=trial).predict(target)
        measured = law(target) * np.exp(0.005 * generator.standard_normal())
        assert low < value < high
        hits += low <= measured <= high
    # Of 16, a 95% interval misses more than 4 once in 1,000 times.
    assert hits >= 12


def test_interval_is_wider_in_extrapolation_and_with_more_noise():
    pattern = np.array([1, -1, 1, 1, -1, 0.5])
    quiet, loud = (fit_scaling_law(X, law(X) * np.exp(noise * pattern), resamples=100) for noise in (0.002, 0.01))
    low, high = quiet.band(np.array([3e13, 1e17]))
    assert high[1] - low[1] > 2 * (high[0] - low[0])
    assert np.ptp(loud.band(1e16)) > 2 * np.ptp(quiet.band(1e16))
    assert loud.noise > quiet.noise
    # A new run has its own noise.
    _, low, high = quiet.predict(3e13)
    assert high - low > np.ptp(quiet.band(3e13))


def test_intervals_are_deterministic():
    noisy = law(X) * np.exp(0.01 * np.cos(np.arange(6)))
    one, other = (fit_scaling_law(X, noisy, resamples=20, seed=5) for _ in range(2))
    np.testing.assert_array_equal(one.draws, other.draws)
    assert one.predict(1e16) == other.predict(1e16)


def test_accelerating_losses_have_no_irreducible_loss():
    fit = fit_scaling_law(X, np.array([6.5, 6.45, 6.35, 6.2, 6.0, 5.7]), resamples=1)
    assert fit.irreducible == 0
    pure = fit_scaling_law(X, 30 * X**-0.05, resamples=1)
    assert pure.irreducible < 0.01
    assert pure.exponent == pytest.approx(0.05, rel=1e-2)


def test_three_points_give_a_law_without_interval():
    fit = fit_scaling_law(X[::2], law(X[::2]))
    assert fit.exponent == pytest.approx(ALPHA, rel=1e-3)
    assert fit.noise is None
    assert fit.band(X) is None
    assert fit.interval("exponent") is None
    assert fit.predict(1e16)[1:] == (None, None)


def test_losses_that_do_not_fall_give_a_flat_law():
    fit = fit_scaling_law(X, np.linspace(3.0, 3.1, 6), resamples=5)
    assert fit.loss(1e16) == pytest.approx(3.05, rel=0.03)


@pytest.mark.parametrize(("x", "loss"), [([1, 2, 2], [3, 2, 2]), ([1, 2, 3], [3, 0, 1]), ([0, 1, 2], [3, 2, 1])])
def test_too_few_points_to_fit_raise(x, loss):
    with pytest.raises(ValueError, match=r"three distinct sizes|positive"):
        fit_scaling_law(np.array(x), np.array(loss))


def test_power_law_matches_linear_regression_and_its_interval():
    generator = np.random.default_rng(1)
    x = np.geomspace(1, 1e4, 7)
    y = 0.02 * x**-0.3 * np.exp(0.1 * generator.standard_normal(7))
    fit, line = fit_power_law(x, y), stats.linregress(np.log(x), np.log(y))
    assert fit.exponent == pytest.approx(line.slope)
    assert fit.value(1e6) == pytest.approx(np.exp(line.intercept + line.slope * np.log(1e6)))
    quantile = stats.t.ppf(0.975, 5)
    low, high = fit.exponent_interval
    assert high - low == pytest.approx(2 * quantile * line.stderr)
    # At x = 1 the value is the intercept, and so is its standard error.
    low, high = fit.band(1.0)
    assert np.log(high / low) == pytest.approx(2 * quantile * line.intercept_stderr)


def test_two_points_give_a_power_law_without_interval():
    fit = fit_power_law(np.array([1.0, 100.0]), np.array([1.0, 0.1]))
    assert fit.exponent == pytest.approx(-0.5)
    assert fit.band(10.0) is None
    assert fit.exponent_interval is None
    with pytest.raises(ValueError, match="two distinct sizes"):
        fit_power_law(np.array([2.0, 2.0]), np.array([1.0, 3.0]))
