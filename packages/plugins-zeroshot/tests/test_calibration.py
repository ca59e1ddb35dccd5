"""Figures of probabilities by hand, and fits against another minimiser of what their docstrings say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax as scipy_log_softmax

from cdm_core.errors import UserError
from cdm_plugins_zeroshot.calibration import (
    Affine,
    Bin,
    Floats,
    Integers,
    confidence_bins,
    fit_offsets,
    fit_platt,
    fit_temperature,
    log_softmax,
    reliability,
    risk_coverage,
)

RNG = np.random.default_rng(0)


def drawn(log_p: Floats, seed: int = 1) -> Integers:
    """A class of each row, by its probabilities."""
    edges = np.exp(log_p).cumsum(1)[:, :-1]
    return (np.random.default_rng(seed).random((len(log_p), 1)) > edges).sum(1)


# -- figures -------------------------------------------------------------------------------------------------


def test_reliability_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]])
    found = reliability(p, np.array([0, 1, 1, 1]), bins=5)
    assert (found.n, found.accuracy, found.confidence) == (4, 0.75, pytest.approx(0.7625))
    # 0.55 and 0.7 are in different bins, (0.4, 0.6] and (0.6, 0.8]; both 0.9 in (0.8, 1].
    assert found.bins == (Bin(1, 0.55, 1.0), Bin(1, 0.7, 1.0), Bin(2, 0.9, 0.5))
    assert found.ece == pytest.approx((0.45 + 0.3 + 2 * 0.4) / 4)
    assert found.nll == pytest.approx(-np.log([0.9, 0.1, 0.7, 0.55]).mean())
    assert found.brier == pytest.approx(np.mean([2 * 0.01, 2 * 0.81, 2 * 0.09, 2 * 0.2025]))
    spread = math.sqrt(0.55 * 0.45) + math.sqrt(0.7 * 0.3) + math.sqrt(2 * 0.09)
    assert found.floor == pytest.approx(math.sqrt(2 / math.pi) * spread / 4)


def test_the_floor_is_the_ece_of_true_probabilities() -> None:
    log_p = log_softmax(RNG.normal(size=(1000, 4)))
    eces = [reliability(np.exp(log_p), drawn(log_p, seed)).ece for seed in range(30)]
    assert np.mean(eces) == pytest.approx(reliability(np.exp(log_p), drawn(log_p)).floor, rel=0.1)


def test_a_class_held_impossible_costs_everything() -> None:
    assert reliability(np.array([[1.0, 0.0]]), np.array([1])).nll == math.inf


def test_edges_belong_to_the_bin_below() -> None:
    hit = np.array([True, False, True])
    assert confidence_bins(np.array([0.5, 1.0, 0.0]), hit, 2) == (Bin(2, 0.25, 1.0), Bin(1, 1.0, 0.0))


def test_risk_coverage_answers_equal_confidences_together() -> None:
    found = risk_coverage(np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, False, True, False]))
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.risk.tolist() == [0.0, 1 / 3, 1 / 3, 0.5]
    assert found.area == pytest.approx(np.mean([0, 1 / 3, 1 / 3, 0.5]))


# -- fits ----------------------------------------------------------------------------------------------------


def objective(theta: Floats, f: Floats, y: Integers) -> float:
    """N labelled images, two of the median margin, and one of each class with equal scores."""
    a, b = theta[0], theta[1:] - theta[1:].mean()
    top = np.sort(f, 1)
    margin = np.median(top[:, -1] - top[:, -2])
    images = -scipy_log_softmax(a * f - b, axis=1)[np.arange(len(f)), y].sum()
    doubt = np.logaddexp(0, a * margin) + np.logaddexp(0, -a * margin)
    return images + doubt - scipy_log_softmax(-b).sum()


@pytest.mark.parametrize("classes", [2, 5])
def test_fits_are_the_least_of_what_they_say(classes: int) -> None:
    f = RNG.normal(size=(60, classes)) * 3
    y = drawn(log_softmax(0.4 * f - np.arange(classes)))
    scale = fit_temperature(f, y)
    best = minimize(lambda a: objective(np.array([a[0], *[0.0] * classes]), f, y), [0.1], tol=1e-12)
    assert scale.scale == pytest.approx(best.x[0], rel=1e-5)
    assert scale.offsets == ()
    both = fit_offsets(f, y)
    best = minimize(objective, np.full(classes + 1, 0.1), args=(f, y), tol=1e-12)
    assert both.scale == pytest.approx(best.x[0], rel=1e-4)
    assert both.offsets == pytest.approx(best.x[1:] - best.x[1:].mean(), abs=1e-4)


def test_the_truth_is_found_with_many_images() -> None:
    f = RNG.normal(size=(40_000, 4)) * 2
    truth = Affine(0.7, (0.5, -1.0, 0.25, 0.25))
    found = fit_offsets(f, drawn(truth(f)))
    assert found.scale == pytest.approx(0.7, rel=0.03)
    assert found.offsets == pytest.approx(truth.offsets, abs=0.05)
    flat = Affine(0.3)
    assert fit_temperature(f, drawn(flat(f))).scale == pytest.approx(0.3, rel=0.03)


def test_units_and_constants_of_scores_do_not_matter() -> None:
    f = RNG.normal(size=(80, 3))
    y = drawn(log_softmax(f))
    log_p = fit_temperature(f, y)(f)
    moved = 1e-5 * f + RNG.normal(size=(80, 1)) * 100  # a number an image tells nothing of classes
    np.testing.assert_allclose(fit_temperature(moved, y)(moved), log_p, atol=1e-6)


def test_images_that_are_all_right_leave_a_doubt() -> None:
    """One imaginary image of n + 2 is wrong, so 1 / (n + 2) is left at the median margin: Laplace's rule."""
    n = 200
    y = np.arange(n) % 2
    f = np.where(np.arange(2) == y[:, None], 1.0, 0.0)
    for fitted in (fit_temperature(f, y), fit_offsets(f, y)):
        assert np.exp(fitted(f))[0].min() == pytest.approx(1 / (n + 2), rel=1e-6)


def test_scores_that_tell_nothing_become_flat_and_keep_their_order() -> None:
    f = RNG.normal(size=(400, 3))
    fitted = fit_temperature(f, f.argmin(1))
    assert fitted.scale > 0
    p = np.exp(fitted(f))
    assert (p.argmax(1) == f.argmax(1)).all()
    assert p.max() < 0.34


def test_a_class_without_images_is_not_ruled_out() -> None:
    f = RNG.normal(size=(50, 3))
    f[:, 2] -= 3
    offsets = fit_offsets(f, f[:, :2].argmax(1)).offsets
    assert np.isfinite(offsets).all()
    assert offsets[2] == max(offsets)


def test_platt_is_the_least_of_its_cross_entropy() -> None:
    x = np.stack([np.ones(100), RNG.normal(size=100)], 1)
    hit = RNG.random(100) < 1 / (1 + np.exp(-(0.5 + 2 * x[:, 1])))
    right = hit.sum()
    target = np.where(hit, (right + 1) / (right + 2), 1 / (100 - right + 2))

    def cross_entropy(w: Floats) -> float:
        z = x @ w
        return float((np.logaddexp(0, z) - target * z).mean())

    found, best = fit_platt(x, hit), minimize(cross_entropy, [0.0, 0.0], tol=1e-12)
    assert found.weights == pytest.approx(best.x, abs=1e-4)
    np.testing.assert_allclose(found(x), 1 / (1 + np.exp(-x @ best.x)), atol=1e-5)


def test_platt_of_hits_alone_and_of_one_cost() -> None:
    """Every image cost the same: the share of hits, by Platt's targets, is all there is to say."""
    x = np.stack([np.ones(8), np.full(8, 3.0)], 1)
    np.testing.assert_allclose(fit_platt(x, np.ones(8, dtype=bool))(x), 9 / 10)
    half = np.arange(8) % 2 == 0
    np.testing.assert_allclose(fit_platt(x, half)(x), (5 / 6 + 1 / 6) / 2)


def test_what_does_not_fit_together_is_refused() -> None:
    y = np.array([0, 1])
    for scores, labels, says in (
        (np.zeros((2, 2)), y, "equal scores"),
        (np.array([[0.0, np.inf], [0, 1]]), y, "finite scores"),
        (np.eye(2), np.array([0, 2]), "one label of 0 .. 1"),
        (np.eye(2), np.array([0]), "for each of 2 images"),
        (np.ones((2, 1)), np.array([0, 0]), "2 classes at least"),
    ):
        with pytest.raises(UserError, match=says):
            fit_temperature(scores, labels)
    with pytest.raises(UserError, match=r"labels? of 0 .. 1 for each of 2 images"):
        reliability(np.eye(2), np.array([0, 2]))
    with pytest.raises(UserError, match="finite features"):
        fit_platt(np.array([[np.nan]]), np.array([True]))
