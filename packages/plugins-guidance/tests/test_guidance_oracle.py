"""Guidance where the answer is known: exact denoisers, exact classifiers, exact posteriors. Float64.

What claims to sample p(x0) p(y | x0) is held to its mean and covariance, under every sampler that it claims
them for: rules score and mean with look x_t and the exact noisy classifier; with look x0-through where the
log-ratio is linear in x0 and the data are one Gaussian; with look x0 and jacobian gaussian where those are
N(0, I). The other combinations have no distribution to be held to, and one test shows how far off they are.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cdm_core import samplers
from cdm_core.mixtures import GaussianMixture
from cdm_core.samplers import Conditional
from cdm_plugins_guidance.apply import GuidedDenoiser
from cdm_plugins_guidance.apply_configs import GuidedConfig, TermConfig
from cdm_plugins_guidance.guide import Guide
from cdm_plugins_guidance.guide_configs import GuideConfig

ROWS = 4000
SIGMAS = torch.logspace(math.log10(40), -2, 150, dtype=torch.float64)
SAMPLERS = ("ddpm", "ddim", "euler", "heun", "dpm_solver", "dpm_solver_pp")


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads would cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Classes(GaussianMixture):
    """A mixture that a guide takes for a noise-aware classifier: log p(y | x; sigma), exactly."""

    @property
    def num_classes(self):
        return self.components


class Linear(nn.Module):
    """Logits f = A x0. With the joint log-ratio f_y guidance tilts the data by exp(s a_y . x0)."""

    def __init__(self, directions):
        super().__init__()
        self.directions, self.num_classes = nn.Parameter(directions), len(directions)

    def forward(self, x):
        return x.flatten(1) @ self.directions.T


def posterior_guide(mixture):
    return Guide(mixture.eval(), GuideConfig())


def tilting_guide():
    return Guide(Linear(DIRECTIONS.clone()).eval(), GuideConfig(tau2=0.0))


def mixture():
    means = torch.tensor([[-1.0, 0.2], [0.9, 0.6], [0.2, -1.1]])
    factors = torch.tensor([[[0.4, 0.0], [0.2, 0.3]], [[0.5, 0.0], [-0.2, 0.4]], [[0.3, 0.0], [0.0, 0.6]]])
    return Classes(torch.tensor([0.5, 0.3, 0.2]), means, factors @ factors.mT)


def guided(model, guide, **term):
    """The unconditional model, steered by the guide alone."""
    return GuidedDenoiser(GuidedConfig(terms=(TermConfig(**term),), condition=False), model, [guide])


def walk(name, model, y, start, **options):
    """Samples (B, 2) of a sampler from its start, with noise of a seed of its own."""
    source = torch.Generator().manual_seed(5)
    draw = lambda x: torch.randn(x.shape, generator=source, dtype=x.dtype)  # noqa: E731
    out = getattr(samplers, name)(Conditional(model, y), start, SIGMAS, noise=draw, **options)
    return out.flatten(1)


def assert_moments(found, mean, covariance, label, bias=0.02):
    """Mean and covariance within 4 standard errors of the exact ones, and `bias` of the step's length."""
    std = covariance.diagonal().sqrt()
    error = (found.mean(0) - mean).abs() / std
    assert float(error.max()) < 4 / math.sqrt(len(found)) + bias, f"{label}: mean off by {error} std"
    error = (found.T.cov() - covariance).abs() / std.outer(std)
    assert float(error.max()) < 4 * math.sqrt(2 / len(found)) + bias, f"{label}: covariance off by {error}"


# ---- The exact noisy classifier


def test_the_score_with_the_exact_noisy_classifier_is_the_conditional_denoiser():
    """D + sigma^2 grad log p(y | x) = E[x0 | x, y] at every level, with a step and without."""
    exact = mixture()
    model = guided(exact, posterior_guide(exact), look="x_t")
    y = torch.arange(60) % 3
    for sigma in (0.01, 0.1, 0.5, 2.0, 10.0, 80.0):
        x = exact.means[y].view(-1, 2, 1, 1) + (1 + sigma) * normal(60, 2, 1, 1)
        level = x.new_full((60,), sigma)
        expected = exact.denoise(x, level, y)
        for out in (
            model.denoise(x, level, y),
            model.predict_step(x, samplers.Step(0, 1, sigma, 0.0), y).x0,
        ):
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_score_with_the_exact_noisy_classifier_samples_the_posterior(sampler):
    exact = mixture()
    model = guided(exact, posterior_guide(exact), look="x_t")
    for label in range(3):
        y = torch.full((ROWS,), label)
        start = exact.means.mean(0).view(2, 1, 1) + SIGMAS[0] * normal(ROWS, 2, 1, 1, seed=label)
        found = walk(sampler, model, y, start)
        bias = 0.08 if sampler in ("ddpm", "ddim", "euler") else 0.02  # first order in the step
        assert_moments(found, exact.means[label], exact.covariances[label], f"class {label}", bias)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver_pp"])
def test_the_mean_with_the_exact_noisy_classifier_samples_the_posterior(sampler, variance):
    exact = mixture()
    model = guided(exact, posterior_guide(exact), look="x_t", rule="mean", variance=variance)
    label = 1
    y = torch.full((ROWS,), label)
    start = exact.means.mean(0).view(2, 1, 1) + SIGMAS[0] * normal(ROWS, 2, 1, 1)
    found = walk(sampler, model, y, start)
    assert_moments(found, exact.means[label], exact.covariances[label], "class 1", 0.1)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_mean_becomes_the_score_as_steps_get_shorter(variance):
    """Order 1: the two predictions differ by a share of the step's length."""
    exact = mixture()
    y = torch.arange(60) % 3
    x = normal(60, 2, 1, 1)
    mean, score = (
        guided(exact, posterior_guide(exact), look="x_t", **term)
        for term in ({"rule": "mean", "variance": variance}, {"rule": "score"})
    )
    gaps = []
    for share in (0.9, 0.95, 0.975):
        step = samplers.Step(0, 2, 1.5, 1.5 * share)
        gap = mean.predict_step(x, step, y).x0 - score.predict_step(x, step, y).x0
        gaps.append(float(gap.abs().max()))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.15)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.15)


# ---- Exponential tilts of one Gaussian: p(x0) exp(s a . x0) is N(m + s C a, C)

DIRECTIONS = torch.tensor([[1.0, -0.5], [-0.7, 0.3]], dtype=torch.float64)


def one_gaussian():
    covariance = torch.tensor([[[0.8, 0.3], [0.3, 0.5]]])
    return GaussianMixture(torch.ones(1), torch.tensor([[0.6, -0.4]]), covariance)


def tilted(data, label, scale):
    """The tilted Gaussian, and its mean."""
    mean = data.means + scale * (data.covariances[0] @ DIRECTIONS[label])[None]
    return GaussianMixture(torch.ones(1), mean, data.covariances), mean[0]


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, -2.0])
def test_through_the_denoiser_a_linear_log_ratio_tilts_a_gaussian_exactly(scale):
    data = one_gaussian()
    model = guided(data, tilting_guide(), look="x0-through", scale=scale)
    for label in range(2):
        target, _ = tilted(data, label, scale)
        y = torch.full((20,), label)
        for sigma in (0.02, 0.7, 30.0):
            x = (1 + sigma) * normal(20, 2, 1, 1)
            level = x.new_full((20,), sigma)
            torch.testing.assert_close(
                model.denoise(x, level, y), target.denoise(x, level), rtol=0, atol=1e-9
            )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_through_the_denoiser_a_linear_log_ratio_is_sampled(sampler):
    data, label, scale = one_gaussian(), 1, 1.5
    rule = {"rule": "mean", "variance": "large"} if sampler == "ddpm" else {"rule": "score"}
    model = guided(data, tilting_guide(), look="x0-through", scale=scale, **rule)
    target, mean = tilted(data, label, scale)
    start = data.means[0].view(2, 1, 1) + SIGMAS[0] * normal(ROWS, 2, 1, 1, seed=2)
    found = walk(sampler, model, torch.full((ROWS,), label), start)
    bias = 0.02 if sampler in ("heun", "dpm_solver", "dpm_solver_pp") else 0.08
    assert_moments(found, mean, target.covariances[0], sampler, bias)


def test_detached_guidance_is_exact_for_unit_gaussian_data_with_the_gaussian_jacobian_alone():
    data = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    guide, label = tilting_guide(), 0
    target = GaussianMixture(torch.ones(1), DIRECTIONS[[label]], torch.eye(2)[None])
    y = torch.full((20,), label)
    for sigma in (0.05, 1.0, 20.0):
        x = (1 + sigma) * normal(20, 2, 1, 1)
        level = x.new_full((20,), sigma)
        expected = target.denoise(x, level)
        out = {
            j: guided(data, guide, look="x0", jacobian=j).denoise(x, level, y)
            for j in ("gaussian", "vp", "ve")
        }
        torch.testing.assert_close(out["gaussian"], expected, rtol=0, atol=1e-12)
        # The published identity moves by 1 / alpha too far, that in x by 1 / alpha^2.
        signal = 1 / (1 + sigma**2)
        plain = data.denoise(x, level)
        torch.testing.assert_close((out["vp"] - plain) * signal**0.5, expected - plain, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close((out["ve"] - plain) * signal, expected - plain, rtol=1e-9, atol=1e-12)


def test_the_published_detached_guidance_steers_but_does_not_sample_the_posterior():
    """EluCD's approximations at work on data where the truth is known: right class, wrong spread."""
    exact, label = mixture(), 1
    y = torch.full((ROWS,), label)
    start = exact.means.mean(0).view(2, 1, 1) + SIGMAS[0] * normal(ROWS, 2, 1, 1)
    found = walk("ddim", guided(exact, posterior_guide(exact), look="x0"), y, start)
    assert float((exact.class_logits(found, 0.0).argmax(1) == label).double().mean()) > 0.9
    with pytest.raises(AssertionError, match="off by"):
        assert_moments(found, exact.means[label], exact.covariances[label], "detached", 0.1)
