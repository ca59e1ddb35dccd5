"""Against Gaussian mixtures, of which denoiser, bound and Bayes' rule are known exactly."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws
from cdm_plugins_zeroshot.adapter import AtLevel, DiffusionClassifier
from cdm_plugins_zeroshot.discrete_elbo import bounds, chain_end, last_term, prior_term
from cdm_plugins_zeroshot.estimators import Estimator, bin_means, fit_bins
from cdm_plugins_zeroshot.race import Race, Verdict
from cdm_plugins_zeroshot.zeroshot_configs import ClassifierConfig, EliminationConfig, EstimatorConfig

CLASSES, DIM, IMAGES = 10, 6, 300
SHAPE = (DIM, 1, 1)
ELBO = EstimatorConfig(
    pairs=128, block=16, design="systematic", weight="elbo", importance="weight", tile=1024, in_flight=100
)


class Oracle(nn.Module):
    """The classes of a mixture, denoised exactly, on levels evenly spaced in log sigma."""

    null_label = None
    num_classes = CLASSES

    def __init__(self, levels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(CLASSES, DIM, generator=generator) * 0.9
        factor = torch.randn(CLASSES, DIM, DIM, generator=generator) * 0.25
        covariances = factor @ factor.mT + 0.05 * torch.eye(DIM)
        self.mixture = GaussianMixture(torch.ones(CLASSES), means, covariances)
        self.sigmas = torch.logspace(-2, math.log10(60), levels, dtype=torch.float64)

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        return self.mixture.denoise(x, sigma, y)

    def bound(self, x0: Tensor, y: Tensor) -> np.ndarray:
        """The bound of -log p(x0 | y), (B,): D is linear, x0 - D = (I - A)(x0 - mu) - sigma A n."""
        estimator = Estimator.of(self, ELBO, SHAPE)
        clean, top, start = chain_end(self, estimator)
        variance = self.sigmas.square()[:, None, None] * torch.eye(DIM)
        covariances = self.mixture.covariances
        gain = covariances[:, None] @ torch.linalg.inv(covariances[:, None] + variance)  # (K, N, d, d)
        weight = torch.from_numpy(estimator.weights) / DIM / self.sigmas.square()
        steps = []
        for image, label in zip(x0.flatten(1).double(), y, strict=True):
            off = (torch.eye(DIM) - gain[label]) @ (image - self.mixture.means[label])
            noise = self.sigmas.square() * gain[label].square().sum((1, 2))
            steps.append(float(weight @ (off.square().sum(1) + noise)))
        return np.array(steps) + (prior_term(x0, top, start) + last_term(x0, clean, None)).numpy()


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(200).eval()


@pytest.fixture(scope="module")
def images(oracle) -> tuple[Tensor, Tensor]:
    return oracle.mixture.sample(1000, Draws(1, 1000))


def run(oracle, x0, config, rule) -> list[Verdict]:
    return sorted(Race(oracle, config, rule, SHAPE)(enumerate(x0)), key=lambda v: v.image)


def labels(verdicts) -> Tensor:
    return torch.tensor([v.label for v in verdicts])


def test_the_bound_is_true_and_its_interval_covers(oracle, images) -> None:
    """1,000 images: unbiased, and the 95% interval holds the truth 93% to 97% of the time."""
    x0, y = images
    truth = oracle.bound(x0, y)
    asked = ((i, x0[i], int(y[i])) for i in range(1000))
    found = list(bounds(oracle, asked, ELBO, SHAPE))
    off = np.array([bound.nats for bound in found]) - truth
    covered = np.mean([b.low <= true <= b.high for b, true in zip(found, truth, strict=True)])
    assert 0.93 <= covered <= 0.97
    assert abs(off.mean()) < 3 * off.std() / math.sqrt(1000)
    # each within its own standard error: z has a variance of 1, as Student's t of 7 degrees has 7 / 5
    assert np.var(off / [b.error for b in found]) == pytest.approx(7 / 5, rel=0.15)


def test_the_bound_lies_above_the_truth_and_falls_to_it(images) -> None:
    """A chain of more steps loses less: what it loses goes as one over their number."""
    x0, y = images[0][:50], images[1][:50]
    lost = []
    for levels in (100, 200, 400):
        oracle = Oracle(levels)
        lost.append(oracle.bound(x0, y) + oracle.mixture.log_density(x0, y).double().numpy())
    assert all((loss > 0).all() for loss in lost)
    for coarse, fine in itertools.pairwise(lost):
        assert coarse.mean() / fine.mean() == pytest.approx(2, rel=0.1)


def test_the_classifier_is_bayes_rule(oracle, images) -> None:
    """Scores by the bound differ from log p(x | y) by noise alone, and with little noise so do decisions."""
    x0 = images[0][:100]
    flat = run(oracle, x0, replace(ELBO, pairs=512), EliminationConfig(rule="none"))
    joint = oracle.mixture.class_logits(x0.double(), 0.0).numpy()
    exact = joint.max(1, keepdims=True) - joint
    classes = torch.arange(CLASSES)
    bound = np.stack([oracle.bound(x0, classes[k].expand(100)) for k in range(CLASSES)], 1)
    assert (bound.argmin(1) == joint.argmax(1)).mean() >= 0.99  # the bound itself
    for i, found in enumerate(flat):
        rivals = [k for k in range(CLASSES) if k != found.label]
        z = [(found.gaps[k] - (bound[i, k] - bound[i, found.label])) / found.gap_errors[k] for k in rivals]
        assert max(map(abs, z)) < 6
        if np.sort(exact[i])[1] > 3:  # nats
            assert found.label == joint[i].argmax()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight": "elbo", "importance": "weight"},
        {"weight": "heuristic"},
        {"design": "stratified"},
        {"antithetic": True},
    ],
)
def test_a_race_decides_as_the_flat_estimator_at_a_fraction(oracle, images, settings) -> None:
    x0, y = images[0][:IMAGES], images[1][:IMAGES]
    config = EstimatorConfig(pairs=128, tile=1024, in_flight=IMAGES, **settings)
    flat = run(oracle, x0, config, EliminationConfig(rule="none"))
    raced = run(oracle, x0, config, EliminationConfig())
    asked = sum(v.class_evaluations for v in raced) / sum(v.class_evaluations for v in flat)
    assert asked < 0.35
    assert (labels(flat) == labels(raced)).float().mean() >= 0.99
    right = [(labels(v) == y).float().mean() for v in (flat, raced)]
    assert right[1] >= right[0] - 0.007
    assert right[0] > 0.94


def test_intervals_of_the_margin_cover(oracle, images) -> None:
    """Of two given classes, so that none is chosen for its noise; pooled strata err on the safe side."""
    x0 = images[0][:400]
    first, second = (oracle.bound(x0, torch.full((400,), k)) for k in (0, 1))
    truth = np.abs(second - first)
    config = replace(ELBO, pairs=64, block=4, design="vdc")
    rule = EliminationConfig(rule="none")
    found = [*Race(oracle, config, rule, SHAPE, labels=[0, 1])(enumerate(x0))]
    found.sort(key=lambda v: v.image)
    sign = np.where(labels(found).numpy() == (second < first), 1, -1)
    covered = np.mean(
        [v.margin_low <= s * true <= v.margin_high for v, s, true in zip(found, sign, truth, strict=True)]
    )
    assert covered >= 0.93


def test_a_noisy_image_is_denoised_to_its_own_level(oracle, images) -> None:
    """Data that are noisier by s are a mixture too, of covariances C + s^2."""
    level = float(oracle.sigmas[90])
    mixture = oracle.mixture
    widened = mixture.covariances + level**2 * torch.eye(DIM)
    noisy = GaussianMixture(mixture.weights, mixture.means, widened)
    wrapped = AtLevel(oracle, level)
    tau = wrapped.sigmas[::40]
    x, y = images[0][: len(tau)].double() * 2, images[1][: len(tau)]
    torch.testing.assert_close(wrapped.denoise(x, tau, y), noisy.denoise(x, tau, y))


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_logits_are_those_of_bayes_rule_at_any_level(oracle, images, level) -> None:
    x0, noise = images[0][:60], Draws(2, 60).normal(*SHAPE)
    x = x0 + level * noise
    flat = ClassifierConfig(replace(ELBO, pairs=512), EliminationConfig(rule="none"))
    sigma = torch.full((60,), level)
    logits = DiffusionClassifier(flat, oracle).class_logits(x, sigma)
    exact = oracle.mixture.class_logits(x.double(), level).float()
    clear = exact.sort(1).values.diff(dim=1)[:, -1] > 3  # nats
    assert clear.sum() > 25
    assert torch.equal(logits.argmax(1)[clear], exact.argmax(1)[clear])
    raced = DiffusionClassifier(ClassifierConfig(), oracle)
    both = torch.cat([x[:5], x0[5:9], x[:1]]), torch.tensor([level] * 5 + [0.0] * 4 + [level])
    together = raced.class_logits(*both)
    assert torch.equal(together[3:7], raced.class_logits(both[0][3:7], both[1][3:7]))
    assert torch.equal(together[0], together[9])


def test_learned_bins_are_worth_it_where_some_levels_say_nothing(oracle, images) -> None:
    """Fitted on images apart, weights of 5 bins save errors on others where pairs are few."""
    x0, y = images
    flat = EliminationConfig(rule="none")
    race = Race(oracle, EstimatorConfig(pairs=40, tile=1024), flat, SHAPE, keep_table=True)
    means = []
    for found in sorted(race(enumerate(x0[:400])), key=lambda v: v.image):
        level = race.estimator.levels(found.image, 0, 40)
        means.append(bin_means(found.table.losses, level, 200, bins=5))
    bins = tuple(fit_bins(np.stack(means), y[:400].numpy()))
    few = EstimatorConfig(pairs=8, tile=1024, in_flight=300)
    rest = [(i, x0[i]) for i in range(400, 1000)]
    wrong = []
    for config in (few, replace(few, weight="learned", bins=bins)):
        found = list(Race(oracle, config, flat, SHAPE)(rest))
        wrong.append(sum(v.label != int(y[v.image]) for v in found))
    assert wrong[1] < 0.8 * wrong[0]
