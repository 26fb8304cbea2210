"""Schedules against closed forms, and against optax where available."""

import math

import numpy as np
import optax
import pytest

from maxlm.config.optim import ScheduleConfig
from maxlm.optim.schedule import schedule_factor


def factor(step, *, steps=100, **settings):
    return float(schedule_factor(ScheduleConfig(**settings), steps, step))


def factors(steps, **settings):
    return np.array(schedule_factor(ScheduleConfig(**settings), steps, np.arange(steps + 1)))


def test_cosine():
    cosine = {"kind": "cosine", "warmup_steps": 10, "final_factor": 0.1}
    assert [factor(step, **cosine) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert factor(55, **cosine) == pytest.approx(0.55)
    assert factor(100, **cosine) == factor(500, **cosine) == pytest.approx(0.1)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100, end_value=0.1)
    np.testing.assert_allclose(factors(100, **cosine)[10:], [theirs(step) for step in range(10, 101)], atol=1e-6)
    np.testing.assert_allclose(factors(100, **cosine)[:9], [theirs(step + 1) for step in range(9)], atol=1e-6)


def test_linear():
    linear = {"kind": "linear", "warmup_steps": 10, "final_factor": 0.2}
    theirs = optax.linear_schedule(1.0, 0.2, 90, transition_begin=10)
    np.testing.assert_allclose(factors(100, **linear)[10:], [theirs(step) for step in range(10, 101)], atol=1e-6)
    assert factor(55, **linear) == pytest.approx(0.6)


def test_wsd():
    wsd = {"kind": "wsd", "warmup_steps": 4, "decay_fraction": 0.2, "final_factor": 0.0}
    assert [factor(step, **wsd) for step in (0, 3, 4, 50, 80)] == pytest.approx([0.25, 1, 1, 1, 1])
    assert [factor(step, **wsd) for step in (90, 99, 100)] == pytest.approx([0.5, 0.05, 0.0], abs=1e-6)


def test_constant():
    assert [factor(step, kind="constant", warmup_steps=2) for step in (0, 1, 99)] == pytest.approx([0.5, 1, 1])
    assert factor(0, kind="constant", warmup_steps=0) == 1


def test_inverse_square_root():
    """min(step^-1/2, step * warmup^-3/2) of steps counted from 1, over its largest value (arXiv:1706.03762)."""
    expected = [min(step**-0.5, step * 16**-1.5) / 16**-0.5 for step in range(1, 102)]
    np.testing.assert_allclose(factors(100, kind="inverse_sqrt", warmup_steps=16), expected, rtol=1e-6)
    assert factor(99, kind="inverse_sqrt", warmup_steps=0) == pytest.approx(0.1)


def test_warm_restarts():
    """Cycles of equal and of growing length, against joined optax schedules (arXiv:1608.03983)."""
    equal = {"kind": "cosine_restarts", "warmup_steps": 0, "final_factor": 0.1, "cycles": 4}
    growing = {**equal, "cycles": 3, "cycle_growth": 2.0}
    for settings, lengths in ((equal, [25] * 4), (growing, [20, 40, 80])):
        cycles = [
            {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0, "decay_steps": length, "end_value": 0.1}
            for length in lengths
        ]
        theirs = optax.sgdr_schedule(cycles)
        got = factors(sum(lengths), **settings)
        np.testing.assert_allclose(got, [theirs(step) for step in range(sum(lengths) + 1)], atol=1e-5)
    starts = [factor(step, **{**equal, "warmup_steps": 20}) for step in (20, 40, 60, 80)]
    assert starts == pytest.approx([1, 1, 1, 1])
    assert factor(39, **{**equal, "warmup_steps": 20}) == pytest.approx(0.55 + 0.45 * math.cos(math.pi * 0.95))


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "inverse_sqrt", "cosine_restarts", "constant"])
def test_run_may_end_during_warmup(kind):
    got = factors(5, kind=kind, warmup_steps=10)
    assert (np.diff(got) > 0).all() or kind == "wsd"
    assert got.max() <= 1
