"""Scores of belonging where they are known, and how well they tell against counting."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.manager import load_registry
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws
from cdm_core.runs import Run
from cdm_plugins_zeroshot.answers import Desk, Images
from cdm_plugins_zeroshot.discrete_elbo import bounds
from cdm_plugins_zeroshot.estimators import Estimator
from cdm_plugins_zeroshot.methods import choose
from cdm_plugins_zeroshot.ood import (
    allows,
    area,
    code_nats,
    corrected,
    detection,
    false_positives,
    method_of,
    needs_null,
    null_gap,
    on_data,
    score_of,
)

RNG = np.random.default_rng(0)


# -- how well scores tell ------------------------------------------------------------------------------------


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    inside, outside = RNG.integers(0, 6, 40) * 1.0, RNG.integers(-2, 4, 30) * 1.0
    gaps = inside[:, None] - outside
    assert area(inside, outside) == pytest.approx(((gaps > 0) + 0.5 * (gaps == 0)).mean())
    assert area(outside, inside) == pytest.approx(1 - area(inside, outside))


def test_two_normal_distributions() -> None:
    """AUROC is Phi(1 / sqrt 2); a threshold that 95% pass leaves 1 - Phi(1 - 1.645) of the others."""
    found = [detection(RNG.normal(1, 1, 150), RNG.normal(0, 1, 200)) for _ in range(200)]
    truth = 0.760250
    aurocs = np.array([one.auroc for one in found])
    assert aurocs.mean() == pytest.approx(truth, abs=4 * aurocs.std() / math.sqrt(200))
    assert np.mean([one.auroc_se for one in found]) == pytest.approx(aurocs.std(), rel=0.15)
    large = detection(RNG.normal(1, 1, 100_000), RNG.normal(0, 1, 100_000))
    assert large.auroc == pytest.approx(truth, abs=4 * large.auroc_se)
    assert large.fpr95 == pytest.approx(0.7405, abs=0.01)


def test_false_positives_at_a_threshold_that_enough_pass() -> None:
    inside = np.arange(20.0)
    assert false_positives(inside, np.array([0.0, 0.5, 1.0, 30.0])) == 0.5  # 19 of 20 reach 1
    assert false_positives(inside, np.array([0.0, 0.5]), kept=1.0) == 1.0


def test_scores_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="images others: 0 scores"):
        area(np.zeros(2), np.zeros(0))
    with pytest.raises(UserError, match="images of the data: 1 scores, all of which must be numbers"):
        detection(np.array([math.nan]), np.zeros(2))


# -- scores --------------------------------------------------------------------------------------------------


def test_a_gap_is_what_the_best_class_explains() -> None:
    losses = np.array([[3.0, 1.0], [2.0, 2.5]])
    assert null_gap(losses, np.array([1.5, 1.0])).tolist() == [0.5, -1.0]


def test_simple_images_have_short_codes() -> None:
    pixels = np.stack([np.full((1, 16, 16), 7), RNG.integers(0, 256, (1, 16, 16))]).astype(np.uint8)
    simple, noisy = code_nats(pixels)
    assert simple < 0.1 * noisy
    assert noisy == pytest.approx(256 * 8 * math.log(2), rel=0.1)  # noise cannot be shortened
    assert corrected(np.array([5.0, 5.0]), pixels).tolist() == [5 + simple, 5 + noisy]


class Exact(torch.nn.Module):
    """A mixture whose class 3 is "no class"."""

    num_classes, null_label = 3, 3

    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(3) * 2 * math.pi / 3
        means = torch.stack([angle.cos(), angle.sin()], 1)
        self.mixture = GaussianMixture(torch.ones(3), means, 0.02 * torch.eye(2).expand(3, 2, 2))

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        free = self.mixture.denoise(x, sigma)
        if y is None:
            return free
        known = self.mixture.denoise(x, sigma, y.clamp(max=2))
        return torch.where((y == 3)[:, None, None, None], free, known)

    def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        return self.mixture.log_density(x, y, sigma)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    info = DataInfo("points", (2, 1, 1), num_classes=3, levels=None)
    return Desk(Run(Exact(), info, registry=load_registry(no_plugins=True)), tmp_path)


def images(x0: Tensor) -> Images:
    names = [str(i) for i in range(len(x0))]
    return Images(names, None, lambda numbers: x0[list(numbers)], {"content": float(x0.sum())})


METHODS = {
    "flat": choose("flat", ["estimator.pairs=32", "estimator.levels=50"]),
    "bayes": choose("bayes", ["bayes.draws=2"]),
}


def asked(desk: Desk, score: str, given: Images) -> np.ndarray:
    method = method_of(score, METHODS["flat"], METHODS["bayes"])
    assert allows(desk, score, method) is None
    desk.answer(method, given, null=needs_null(score))
    rows = desk.rows(method, given, null=needs_null(score))
    assert rows is not None
    return score_of(score, desk, method, given, rows)


def test_likelihoods_tell_points_from_the_gap_between_classes(desk: Desk) -> None:
    x0, _ = desk.run.model.mixture.sample(40, Draws(0, 40))
    inside, outside = images(x0), images(0.1 * torch.randn(40, 2, 1, 1))
    for score in ("bound", "density"):
        assert detection(asked(desk, score, inside), asked(desk, score, outside)).auroc > 0.95
    truth = desk.run.model.mixture.log_density(x0)
    np.testing.assert_allclose(asked(desk, "density", inside), truth, rtol=1e-5)


def test_the_gap_is_that_of_the_very_pairs_that_classify(desk: Desk) -> None:
    x0, labels = desk.run.model.mixture.sample(4, Draws(0, 4))
    found = asked(desk, "gap", images(x0))
    estimator = Estimator.of(desk.run.model, METHODS["flat"].estimator, (2, 1, 1))
    for image, label in enumerate(labels):
        pairs = estimator.pairs(image, 0, 32)
        clean = x0[image].expand(32, 2, 1, 1)
        x = clean + pairs.sigma[:, None, None, None] * pairs.noise
        known, free = (
            (clean - desk.run.model.denoise(x, pairs.sigma, torch.full((32,), y))).flatten(1)
            / pairs.sigma[:, None]
            for y in (int(label), 3)
        )
        gap = free.square().mean() - known.square().mean()
        assert found[image] == pytest.approx(float(gap), rel=1e-3, abs=1e-5)


def test_the_bound_is_the_bound(desk: Desk) -> None:
    """That of `discrete_elbo`, of the same pairs, without a class."""
    x0, _ = desk.run.model.mixture.sample(5, Draws(0, 5))
    method = method_of("bound", METHODS["flat"], METHODS["bayes"])
    wanted = bounds(desk.run.model, [(i, x, None) for i, x in enumerate(x0)], method.estimator, (2, 1, 1))
    found = asked(desk, "bound", images(x0))
    np.testing.assert_allclose(found, [-one.nats for one in wanted], rtol=1e-5)


def test_a_run_without_the_score_says_why(desk: Desk) -> None:
    density = method_of("corrected", METHODS["flat"], METHODS["bayes"])
    assert "needs images with grey levels; 'points' has none" in str(allows(desk, "corrected", density))
    desk.run.model.null_label = None
    assert '"no class" among its labels; the model was not' in str(allows(desk, "gap", METHODS["flat"]))
    desk.run.model.num_classes = None
    assert "needs a class-conditional model" in str(allows(desk, "density", METHODS["bayes"]))


def test_other_data_must_fit(desk: Desk) -> None:
    with pytest.raises(UserError, match=r"--against core/digits: the run takes \(C, H, W\) \(2, 1, 1\)"):
        on_data(desk.run, "digits")
    other = on_data(desk.run, "gaussian-mixture")
    assert len(other.split("test")) > 0
    assert desk.run.data is None
