"""Which pairs, which losses, which weights: designs cover the levels, weights are what their sources say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cdm_core import schedules
from cdm_core.errors import UserError
from cdm_plugins_zeroshot.estimators import (
    Estimator,
    best_proposal,
    bin_means,
    elbo_weights,
    fit_bins,
    levels_of,
    spread,
    van_der_corput,
)
from cdm_plugins_zeroshot.zeroshot_configs import EstimatorConfig

SIGMAS = schedules.linear(1000).ve_sigmas
SHAPE = (1, 2, 2)
DESIGNS = ["iid", "grid", "stratified", "vdc", "systematic"]


def make(sigmas=SIGMAS, **settings) -> Estimator:
    config = EstimatorConfig(**settings)
    config.check()
    return Estimator(config, sigmas, SHAPE)


def test_van_der_corput_are_the_digits_backwards() -> None:
    assert van_der_corput(8).tolist() == [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


@pytest.mark.parametrize("pairs", [50, 100, 250, 300, 400, 500, 600, 999])
def test_a_grid_covers_all_levels_whatever_its_size(pairs) -> None:
    """With a step of 1000 // pairs from its half on, 300 places end at 898, 400 at 799 and 600 at 599."""
    levels = make(pairs=pairs, design="grid").levels(0, 0, pairs).sort().values
    step = 1000 / pairs
    assert torch.equal(levels, ((torch.arange(pairs) + 0.5) * step).floor().long())
    assert levels[0] < step
    assert levels[-1] >= 1000 - step
    if 1000 % pairs == 0:  # then as published
        assert torch.equal(levels, torch.arange(1000 // pairs // 2, 1000, 1000 // pairs))


@pytest.mark.parametrize("design", ["grid", "stratified", "vdc"])
@pytest.mark.parametrize("pairs", [96, 100])
def test_prefixes_cover_all_levels_evenly(design, pairs) -> None:
    estimator = make(pairs=pairs, design=design)
    for n in (4, 8, 16, 32, 64):
        quarter = estimator.levels(3, 0, n) // 250
        assert torch.bincount(quarter, minlength=4).tolist() == pytest.approx([n / 4] * 4, abs=1)


def test_each_stratum_has_one_place() -> None:
    estimator = make(pairs=100, design="stratified")
    assert sorted(int(estimator.place(5, i) * 100) for i in range(100)) == list(range(100))


def test_systematic_blocks_are_evenly_spaced_and_shifted_apart() -> None:
    estimator = make(pairs=32, design="systematic", block=8)
    places = np.array([estimator.place(0, i) for i in range(32)]).reshape(4, 8)
    assert np.diff(places, axis=1) == pytest.approx(1 / 8)
    assert len(set(places[:, 0])) == 4


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("importance", ["uniform", "weight", "table"])
def test_every_design_draws_levels_in_proportion(design, importance) -> None:
    proposal = (3.0, 1.0, 0.5, 1.0) if importance == "table" else ()
    sigmas = torch.logspace(-1, 1, 12, dtype=torch.float64)
    estimator = make(
        sigmas, pairs=20, design=design, block=4, importance=importance, proposal=proposal, weight="heuristic"
    )
    drawn = torch.cat([estimator.levels(image, 0, 20) for image in range(400)])
    share = torch.bincount(drawn, minlength=12) / len(drawn)
    if (
        design == "grid"
    ):  # the same for every image: each level as often as its part of the scale holds places
        edges = np.concatenate([[0], estimator.share.cumsum()])
        expected = np.diff(np.ceil(edges * 20 - 0.5 - 1e-9)) / 20
        assert share.numpy() == pytest.approx(expected, abs=1e-6)
    else:
        assert share.numpy() == pytest.approx(estimator.share, abs=5 * math.sqrt(0.25 / len(drawn)))


@pytest.mark.parametrize("importance", ["uniform", "weight", "table"])
@pytest.mark.parametrize("weight", ["simple", "elbo", "heuristic", "learned"])
def test_importance_leaves_the_estimate_unbiased(importance, weight) -> None:
    """Of a known loss of each level, over images that each have their own shift."""
    sigmas = torch.logspace(-1, 1, 16, dtype=torch.float64)
    bins = (2.0, 1.0, 0.5, 0.25) if weight == "learned" else ()
    proposal = (1.0, 2.0) if importance == "table" else ()
    estimator = make(
        sigmas, pairs=16, importance=importance, weight=weight, bins=bins, proposal=proposal, design="iid"
    )
    loss = 1 + torch.arange(16).double().sin().numpy() / 2
    expected = float(estimator.weights @ loss)
    values = []
    for image in range(1500):
        level = estimator.levels(image, 0, 16)
        values.append(np.mean(estimator.pair_weights(level) * loss[level.numpy()]))
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values) - expected) < 4 * error + 1e-12


def test_pairs_depend_on_seed_image_and_number_alone() -> None:
    whole = make(pairs=12).pairs(7, 0, 12)
    parts = [make(pairs=12).pairs(7, start, stop) for start, stop in [(0, 5), (5, 6), (6, 12)]]
    for field in ("level", "sigma", "noise"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
    for other in (make(pairs=12).pairs(8, 0, 12), make(pairs=12, seed=1).pairs(7, 0, 12)):
        assert not torch.equal(other.noise, whole.noise)
        assert not torch.equal(other.level, whole.level)
    assert len({row.numpy().tobytes() for row in whole.noise}) == 12


@pytest.mark.parametrize("design", DESIGNS)
def test_antithetic_pairs_share_a_level_and_mirror_the_noise(design) -> None:
    estimator = make(pairs=32, block=8, design=design, antithetic=True)
    level, _, _, noise = estimator.pairs(2, 0, 32)
    assert torch.equal(level[::2], level[1::2])
    assert torch.equal(noise[::2], -noise[1::2])
    if design != "iid":  # halves of the pairs, and the whole scale
        assert torch.bincount(level // 250, minlength=4).tolist() == [8, 8, 8, 8]
    odd = estimator.pairs(2, 3, 4)  # cut in the middle of two
    assert torch.equal(odd.noise[0], noise[3])


def test_losses_are_those_of_eps() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise, said = torch.randn(3, 5, 1, 2, 2, generator=generator)
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0, 30.0])
    x = x0 + sigma[:, None, None, None] * noise
    denoised = schedules.eps_to_x0(x, said, sigma)
    for loss, reference in (("l2", F.mse_loss), ("l1", F.l1_loss), ("huber", F.huber_loss)):
        expected = reference(said, noise, reduction="none").flatten(1).mean(1)
        got = make(loss=loss).losses(x0, denoised, sigma)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_losses_are_float32_whatever_the_network_gives() -> None:
    x0, denoised = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(1))
    estimator, sigma = make(), torch.full((4,), 0.3)
    half = denoised.bfloat16()
    expected = ((x0 - half.float()) / 0.3).square().flatten(1).mean(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = estimator.losses(x0, half, sigma)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_elbo_weights_of_the_published_mnist_schedule() -> None:
    """beta from 1e-4 to 0.02 over 401 levels, the first of them never asked; figures by exact arithmetic."""
    sigmas = schedules.linear(401).ve_sigmas
    weights = elbo_weights(sigmas[1:], float(sigmas[0]))
    assert weights[[0, 1, 199, 399]] == pytest.approx([0.749, 0.399, 0.0080, 0.0104], rel=0.01)
    assert weights.sum() == pytest.approx(7.30, abs=0.01)
    assert weights[0] / weights.sum() == pytest.approx(0.10, abs=0.005)
    assert np.searchsorted(weights.cumsum(), weights.sum() / 2) + 1 == 38
    assert elbo_weights(sigmas)[0] == 0  # nothing below the lowest level
    assert elbo_weights(sigmas)[1:] == pytest.approx(weights)
    with pytest.raises(UserError, match="below the lowest level"):
        elbo_weights(sigmas, 1.0)


def test_the_heuristic_weighs_the_error_of_x0() -> None:
    """Clark & Jaini's exp(-7 t), of |x0 - D|^2 = sigma^2 |eps error|^2."""
    estimator = make(weight="heuristic")
    t = (np.arange(1000) + 1) / 1000
    of_x0 = estimator.weights / SIGMAS.numpy() ** 2
    assert of_x0 / of_x0[0] == pytest.approx(np.exp(-7 * (t - t[0])))


def test_bins_are_equal_parts_of_the_levels() -> None:
    assert spread((1.0, 2.0), 5).tolist() == [1, 1, 2, 2, 2]
    weights = make(weight="learned", bins=tuple(range(1, 21))).weights * 1000
    assert weights.reshape(20, 50).tolist() == [[i] * 50 for i in range(1, 21)]


def test_no_pair_is_spent_on_a_level_without_weight() -> None:
    estimator = make(pairs=64, weight="elbo", importance="weight")
    assert min(int(estimator.levels(image, 0, 64).min()) for image in range(20)) > 0
    assert estimator.weights[0] == 0


def test_a_model_without_levels_gets_those_of_the_settings() -> None:
    config = EstimatorConfig(levels=5, sigma_min=0.01, sigma_max=100.0)
    assert levels_of(nn.Identity(), config).tolist() == pytest.approx([0.01, 0.1, 1, 10, 100])
    even = EstimatorConfig(levels=4, sigma_min=1e-4, sigma_max=3.0, spacing="linear")
    assert levels_of(nn.Identity(), even).tolist() == pytest.approx([1e-4, 1.0000667, 2.0000333, 3.0])


def test_bin_means_want_a_pair_in_every_bin() -> None:
    level = torch.tensor([0, 1, 5, 9])
    losses = np.array([[1.0, 3.0, 10.0, 20.0]])
    assert bin_means(losses, level, 10, bins=2).tolist() == [[2.0, 15.0]]
    with pytest.raises(UserError, match="leave some of 3 bins"):
        bin_means(losses[:, :2], level[:2], 10, bins=3)


def test_fitted_bins_find_the_weights_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    true = np.array([3.0, 1.0, 0.0, 0.2])
    means = rng.normal(size=(6000, 5, 4)) * np.array([1, 2, 1, 5])
    logits = -(means @ true)
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    fitted = fit_bins(means, labels, ridge=1e-6)
    assert fitted == pytest.approx(true, abs=0.15)
    with pytest.raises(UserError, match="no differences between classes"):
        fit_bins(np.ones((3, 2, 4)), np.zeros(3, dtype=np.int64))


def test_the_fit_stands_at_its_minimum() -> None:
    """Derivative of the penalised log-likelihood, by autograd."""
    rng = np.random.default_rng(1)
    means, labels = rng.normal(size=(50, 3, 6)), rng.integers(3, size=50)
    fitted = fit_bins(means, labels, ridge=0.1)
    w = torch.tensor(fitted, requires_grad=True)
    scale = torch.tensor((means - means.mean(1, keepdims=True)).std((0, 1)))
    loss = F.cross_entropy(-(torch.tensor(means) @ w), torch.tensor(labels))
    (slope,) = torch.autograd.grad(loss + 0.05 * (scale * w).square().sum(), w)
    assert slope.abs().max() < 1e-9


def test_the_best_proposal_lowers_the_variance() -> None:
    """sum (w sd)^2 / q is least for q = w sd, by Cauchy-Schwarz."""
    weights, deviation = np.array([5.0, 1.0, 0.2, 0.1]), np.array([0.1, 1.0, 2.0, 0.0])
    proposal = best_proposal(weights, deviation)
    assert min(proposal) == 0.05
    q = np.array(proposal) / sum(proposal)
    cost = ((weights * deviation) ** 2 / q).sum()
    assert cost < ((weights * deviation) ** 2 * 4).sum()
    assert cost == pytest.approx((weights * deviation).sum() ** 2, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"antithetic": True, "block": 3}, "come in twos"),
        ({"weight": "elbo", "loss": "l1"}, "loss must be l2"),
        ({"wordings": "likelihood"}, "weight must be elbo"),
        ({"weight": "learned"}, "bins hold"),
        ({"bins": (1.0,)}, "bins hold"),
        ({"importance": "table"}, "proposal holds"),
        ({"importance": "table", "proposal": (0.0,)}, "proposal holds"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min < sigma_max"),
        ({"rate": math.inf}, "rate must be finite"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says) -> None:
    with pytest.raises(ValueError, match=says):
        replace(EstimatorConfig(), **settings).check()
