"""The likelihood bound term by term: against closed forms, quadrature and the chain written out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.testing.conformance import randomise
from cdm_plugins_zeroshot.context_unet import ContextUnet
from cdm_plugins_zeroshot.context_unet_configs import ContextUnetConfig
from cdm_plugins_zeroshot.discrete_elbo import (
    bounds,
    chain_end,
    class_free,
    grey_level_terms,
    last_term,
    prior_term,
)
from cdm_plugins_zeroshot.estimators import Estimator
from cdm_plugins_zeroshot.race import Race
from cdm_plugins_zeroshot.zeroshot_configs import EliminationConfig, EstimatorConfig

SHAPE = (1, 4, 4)
GREY = torch.randint(16, (5, *SHAPE), generator=torch.Generator().manual_seed(0)) / 7.5 - 1
CONFIG = EstimatorConfig(
    pairs=64, block=8, design="systematic", weight="elbo", importance="weight", tile=32, in_flight=3
)


@pytest.fixture(scope="module")
def model() -> ContextUnet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ContextUnet(ContextUnetConfig.small(), DataInfo("test", SHAPE, num_classes=10))
    randomise(net, 0.1)
    return net.eval()


def est(model: nn.Module) -> Estimator:
    return Estimator.of(model, CONFIG, SHAPE)


def test_the_prior_term_is_the_divergence_of_the_start() -> None:
    x0 = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    noisy = torch.distributions.Normal(x0, torch.tensor(3.0, dtype=torch.float64))
    start = torch.distributions.Normal(torch.zeros_like(x0), torch.full_like(x0, 4.0))
    expected = torch.distributions.kl_divergence(noisy, start).flatten(1).sum(1)
    torch.testing.assert_close(prior_term(x0, 3.0, 4.0), expected)


def test_the_prior_term_of_the_published_mnist_schedule() -> None:
    """0.82 nats an image of 784 pixels in [0, 1]; there the start is N(0, I) and alpha^2 = 0.0173."""
    path = schedules.linear(401)
    alpha, sigma = float(path.alpha[-2]), float(path.ve_sigmas[-1])
    squares = 0.1  # mean square of an MNIST pixel: what the divergence is, but for a thousandth
    x0 = torch.full((1, 1, 28, 28), math.sqrt(squares))
    assert float(prior_term(x0, sigma, 1 / alpha)) == pytest.approx(0.82, abs=0.15)


@pytest.mark.parametrize(("sigma", "levels"), [(0.02, 256), (0.5, 8), (0.002, 16)])
def test_grey_level_terms_are_their_integrals(sigma, levels) -> None:
    """By adaptive quadrature, of levels at the border and inside."""
    values = np.linspace(-1, 1, levels)

    def integrand(n: float, k: int) -> float:
        z = values[k] + sigma * n
        away = -((z - values) ** 2) / (2 * sigma**2)
        surprise = np.log(np.exp(away - away.max()).sum()) + away.max() - away[k]
        return surprise * math.exp(-(n**2) / 2) / math.sqrt(2 * math.pi)

    terms = grey_level_terms(sigma, levels)
    for k in (0, 1, levels // 2, levels - 1):
        expected, _ = integrate.quad(integrand, -9, 9, args=(k,), limit=400, epsabs=1e-12)
        assert float(terms[k]) == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_the_last_term_of_continuous_data_is_the_entropy_of_noise() -> None:
    noise = torch.distributions.Normal(0.0, torch.tensor(0.3, dtype=torch.float64))
    expected = 16 * float(noise.entropy())
    assert last_term(GREY, 0.3, None).tolist() == pytest.approx([expected] * 5)


def test_images_between_grey_levels_have_no_last_term() -> None:
    with pytest.raises(UserError, match="dequantised"):
        last_term(GREY + 0.01, 0.3, 16)
    with pytest.raises(UserError, match="dequantised"):
        last_term(GREY * 2, 0.3, 16)


def test_the_chain_starts_where_the_models_path_does(model) -> None:
    """N(0, I) in the path's own scale, x_t = alpha x; and it ends where the model or the settings say."""
    clean, top, start = chain_end(model, est(model))
    assert clean == model.sigma_clean < float(model.sigmas[0])
    assert chain_end(model, Estimator.of(model, replace(CONFIG, sigma_clean=0.01), SHAPE))[0] == 0.01
    assert chain_end(model, Estimator(CONFIG, model.sigmas, SHAPE))[0] == float(model.sigmas[0])
    assert top == float(model.sigmas[-1])
    assert start == pytest.approx(1 / float(model.path.alpha[-1]))


@pytest.mark.parametrize("clean", [0.0, 0.01])
def test_the_bound_is_the_chain_written_out(model, clean, monkeypatch) -> None:
    """Divergences of Gaussian steps at every level, many times, for one image and class."""
    monkeypatch.setattr(model, "sigma_clean", clean)
    images = [(i, GREY[i], i) for i in range(5)]
    found = list(bounds(model, images, CONFIG, SHAPE, grey_levels=16, variance="blocks"))
    assert [bound.image for bound in found] == list(range(5))
    below = [clean] if clean else []
    sigmas = torch.cat([torch.tensor(below, dtype=torch.float64), model.sigmas])
    draws, generator = 60, torch.Generator().manual_seed(9)
    for bound, (_, x0, label) in zip(found, images, strict=True):
        total, squares = 0.0, 0.0
        for before, after in itertools.pairwise(sigmas):
            noise = torch.randn(draws, *SHAPE, generator=generator)
            sigma = after.float().expand(draws)
            with torch.no_grad():
                guess = model.denoise(x0 + after.float() * noise, sigma, torch.full((draws,), label))
            share = 1 - (before / after) ** 2
            variance = before**2 * share
            # of N(mean + share (x0 - guess), variance) from N(mean, variance)
            steps = (share * (x0 - guess).double()).square().flatten(1).sum(1) / (2 * variance)
            total += float(steps.mean())
            squares += float(steps.var()) / draws
        assert abs(bound.steps - total) < 4 * math.hypot(bound.error, math.sqrt(squares))
        _, top, start = chain_end(model, est(model))
        assert bound.prior == float(prior_term(x0[None], top, start))
        assert bound.last == float(last_term(x0[None], float(sigmas[0]), 16))
        assert bound.nats == bound.prior + bound.steps + bound.last
        assert bound.bits_per_dim(16) == pytest.approx(bound.nats / (16 * math.log(2)))
        assert bound.high - bound.nats == pytest.approx(bound.nats - bound.low)
        assert bound.error < 0.2 * bound.steps


def test_scores_of_the_classifier_are_bounds_but_for_what_no_class_changes(model) -> None:
    (verdict,) = Race(model, CONFIG, EliminationConfig(rule="none"), SHAPE)([(2, GREY[2])])
    free = class_free(model, est(model), GREY[2:3], 16)
    for label in (0, 7):
        (bound,) = bounds(model, [(2, GREY[2], label)], CONFIG, SHAPE, grey_levels=16)
        assert float(free) - verdict.scores[label] == pytest.approx(bound.nats, rel=1e-12)


def test_the_bound_without_a_class_asks_the_null_label(model) -> None:
    (bound,) = bounds(model, [(0, GREY[0], None)], CONFIG, SHAPE)
    race = Race(model, CONFIG, EliminationConfig(rule="none"), SHAPE, labels=[model.null_label])
    (verdict,) = race([(0, GREY[0])])
    assert bound.steps == pytest.approx(-verdict.scores[0], rel=1e-12)


def test_a_model_without_classes_has_a_bound_too() -> None:
    class Plain(nn.Module):
        sigmas = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)

        def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
            assert y is None
            return torch.zeros_like(x)

    (bound,) = bounds(Plain().eval(), [(0, GREY[0], None)], CONFIG, SHAPE)
    squares = float(GREY[0].double().square().sum())
    expected = sum(0.5 * (1 / a**2 - 1 / b**2) * squares for a, b in ((0.1, 0.2), (0.2, 0.4)))
    assert bound.steps == pytest.approx(expected, rel=0.1)
    with pytest.raises(UserError, match="knows no classes"):
        list(bounds(Plain().eval(), [(0, GREY[0], 1)], CONFIG, SHAPE))


def test_what_has_no_bound_is_refused(model) -> None:
    with pytest.raises(UserError, match="weight must be elbo"):
        list(bounds(model, [(0, GREY[0], 0)], EstimatorConfig(), SHAPE))
    with pytest.raises(UserError, match="knows classes 0 to 9"):
        list(bounds(model, [(0, GREY[0], 10)], CONFIG, SHAPE))
    with pytest.raises(ValueError, match="training mode"):
        list(bounds(model.train(), [(0, GREY[0], 0)], CONFIG, SHAPE))
    model.eval()
