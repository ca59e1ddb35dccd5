"""Strength schedules against a path's own coefficients, and against published sums."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from cdm_core import schedules
from cdm_core.errors import UserError
from cdm_core.samplers import Step
from cdm_plugins_guidance.apply_configs import METHODS, GuidedConfig, StrengthConfig, TermConfig
from cdm_plugins_guidance.strengths import beta, level_weight, sine, weight

PATH = schedules.linear(1000)


def walk(steps, sigmas=PATH.ve_sigmas):
    levels = [*schedules.grid(sigmas, steps).tolist(), 0.0]
    return [Step(i, steps, t, s, grid=tuple(levels)) for i, (t, s) in enumerate(pairwise(levels))]


def weights(config, steps):
    config.check()
    return [weight(config, step) for step in walk(steps)]


def test_beta_is_that_of_the_levels_visited():
    signal = PATH.alpha[PATH.levels] ** 2
    own = 1 - signal / torch.cat([signal.new_ones(1), signal[:-1]])
    assert [beta(step) for step in walk(1000)][::-1] == pytest.approx(own.tolist(), rel=1e-9)
    # sparser: 250 steps of the 1000, as the off-the-shelf sampler takes them
    assert beta(walk(250)[0]) == pytest.approx(0.0775, abs=5e-4)
    assert sum(map(beta, walk(250))) == pytest.approx(9.85, rel=0.01)


def test_the_sine_of_250_steps_adds_what_was_measured_in_the_official_one():
    steps = walk(250)
    added = [0.3 * beta(steps[0]) * sine(s.number, s.total) for s in steps]
    assert added[-1] == 0
    assert max(added) == pytest.approx(0.0233, abs=2e-4)
    assert added.index(max(added)) == 249 - 125
    assert sum(added) == pytest.approx(3.70, rel=0.01)


@pytest.mark.parametrize(("steps", "total"), [(10, 0.031), (18, 0.054), (36, 0.103)])
def test_the_linear_sine_adds_up_as_published_and_grows_with_the_steps(steps, total):
    assert sum(weights(METHODS["elucd-edm"], steps)) == pytest.approx(total, abs=1e-3)


def test_the_line_has_a_floor_and_a_negative_scale_mirrors_it():
    config = StrengthConfig(schedule="linear-sine", scale=0.001, floor=2e-4)
    found = weights(config, 40)
    line = [max(0.001 * (41 - i) / 41, 2e-4) + 0.0003 * math.sin(math.pi * i / 40) for i in range(40)]
    assert found == pytest.approx(line, rel=1e-12)
    assert weights(replace(config, scale=-0.001), 40) == pytest.approx([-w for w in line], rel=1e-12)
    assert set(weights(replace(config, scale=0.0), 40)) == {0.0}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda path, i: 1.0),
        ("sqrt-noise", lambda path, i: path.sigma[i]),
        ("sqrt-signal", lambda path, i: path.alpha[i]),
        ("sigma2", lambda path, i: path.ve_sigma[i] ** 2),
    ],
)
def test_schedules_by_level_are_the_coefficients_of_the_path(schedule, expected):
    config = StrengthConfig(schedule=schedule, scale=1.5)
    wanted = [1.5 * float(expected(PATH, level)) for level in PATH.levels.flip(0)]
    assert weights(config, 1000) == pytest.approx(wanted, rel=1e-9)
    found = level_weight(config, PATH.ve_sigmas.flip(0))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_schedules_by_both_levels():
    found = [weights(StrengthConfig(schedule=s, scale=2.0), 50) for s in ("alpha", "beta")]
    assert found[1] == pytest.approx([2 * beta(step) for step in walk(50)])
    assert [a + b for a, b in zip(*found, strict=True)] == pytest.approx([2.0] * 50)


def test_intervals_in_steps_and_in_levels():
    config = StrengthConfig(start=0.2, stop=0.5)
    assert [i for i, w in enumerate(weights(config, 10)) if w] == [2, 3, 4]
    config = StrengthConfig(sigma_min=0.1, sigma_max=5.0)
    for step, found in zip(walk(100), weights(config, 100), strict=True):
        assert found == (0.1 <= step.sigma <= 5.0)
    sigma = torch.tensor([0.05, 0.1, 5.0, 6.0])
    assert level_weight(config, sigma).tolist() == [0, 1, 1, 0]
    without_last = weights(StrengthConfig(last=False), 7)
    assert without_last == [1] * 6 + [0]


def test_every_kth_step_weighs_k_times_as_much():
    assert weights(StrengthConfig(every=3, scale=0.5), 7) == [1.5, 0, 0, 1.5, 0, 0, 1.5]
    assert weights(StrengthConfig(every=3, rescale=False), 4) == [1, 0, 0, 1]


def test_only_the_first_half_of_a_step_of_heun():
    step = Step(2, 10, 3.0, 2.0, correction=True)
    assert weight(StrengthConfig(), step) == 1
    assert weight(StrengthConfig(halves="first"), step) == 0
    assert weight(StrengthConfig(schedule="sigma2"), step) == 4  # the second half is at the next level


@pytest.mark.parametrize("schedule", ["constant", "sine", "linear-sine"])
def test_the_whole_push_does_not_depend_on_the_number_of_steps(schedule):
    config = StrengthConfig(schedule=schedule, scale=0.3, reference_steps=18)
    reference = sum(weights(replace(config, reference_steps=0), 18))
    assert weights(config, 18) == pytest.approx(weights(replace(config, reference_steps=0), 18))
    for steps in (7, 40, 256):
        assert sum(weights(config, steps)) == pytest.approx(reference)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schedule": "sine"}, "schedule 'sine'"),
        ({"schedule": "beta"}, "schedule 'beta'"),
        ({"start": 0.5}, "start and stop"),
        ({"every": 2}, "every"),
        ({"reference_steps": 10}, "reference_steps"),
        ({"last": False}, "last = false"),
    ],
)
def test_what_depends_on_the_step_says_so_without_one(change, named):
    with pytest.raises(UserError, match=rf"^{named} of guidance depends on the step"):
        level_weight(StrengthConfig(**change), torch.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": math.nan}, "must be finite"),
        ({"floor": -1.0}, "must be finite"),
        ({"start": 0.6, "stop": 0.5}, "start < stop"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min <= sigma_max"),
        ({"every": 0}, "every must be"),
        ({"schedule": "beta", "reference_steps": 10}, "reference_steps goes with"),
        ({"rule": "nudge", "look": "x0"}, "look 'x_t' or 'rms'"),
        ({"rule": "score", "gamma": 0.3}, "belong to rule 'mean'"),
        ({"rule": "mean", "gamma": math.inf}, "gamma must be finite"),
        ({"eps": 0.0}, "eps and clip"),
        ({"clip": -1.0}, "eps and clip"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GuidedConfig(terms=(TermConfig(**change),)).check()
    with pytest.raises(ValueError, match="at least one term"):
        GuidedConfig(terms=()).check()


def test_the_published_methods_are_in_order():
    for term in METHODS.values():
        GuidedConfig(terms=(term,)).check()
