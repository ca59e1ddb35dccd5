"""The Gaussian mixture is the oracle of other tests, so it is held here against independent arithmetic."""

import math

import pytest
import torch
from scipy.stats import multivariate_normal

from cdm_core import capabilities, schedules
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws


@pytest.fixture
def mixture():
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    covariances = factors @ factors.mT / 4 + 0.05 * torch.eye(4, dtype=torch.float64)
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.tensor([1.0, 2.0, 5.0]), means, covariances)


@pytest.fixture
def points():
    return torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scipy_log_density(mixture, x, k, alpha, sigma):
    covariance = alpha**2 * mixture.covariances[k] + sigma**2 * torch.eye(mixture.dim, dtype=torch.float64)
    density = multivariate_normal(alpha * mixture.means[k].numpy(), covariance.numpy())
    return torch.as_tensor(density.logpdf(x.flatten(1).numpy()))


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.7, 30.0])
def test_log_density_is_scipys(mixture, points, sigma):
    parts = torch.stack([scipy_log_density(mixture, points, k, 1.0, sigma) for k in range(3)], 1)
    expected = (parts + torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64).log()).logsumexp(1)
    torch.testing.assert_close(mixture.log_density(points, sigma=sigma), expected, rtol=1e-10, atol=1e-10)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    chosen = mixture.log_density(points, y, torch.full((6,), sigma, dtype=torch.float64))
    torch.testing.assert_close(chosen, parts[torch.arange(6), y], rtol=1e-10, atol=1e-10)


def test_log_density_of_clean_points_is_that_at_sigma_0(mixture, points):
    assert torch.equal(mixture.log_density(points), mixture.log_density(points, sigma=0.0))


def test_density_integrates_to_one():
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[0.5, 0.0], [-0.5, 0.3]]),
        torch.tensor([[[0.10, 0.04], [0.04, 0.05]], [[0.06, -0.01], [-0.01, 0.08]]]),
    )
    axis = torch.linspace(-4, 4, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = mixture.log_density(grid, sigma=0.2).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("label", [None, 1])
@pytest.mark.parametrize("sigma", [0.02, 0.5, 8.0])
def test_score_and_denoiser_are_gradients_of_the_log_density(mixture, points, sigma, label):
    y = None if label is None else torch.full((6,), label)
    x = points.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, y, torch.tensor(sigma)).sum(), x)
    torch.testing.assert_close(mixture.score(x, sigma, y), gradient, rtol=1e-9, atol=1e-9)
    # Tweedie's formula
    tweedie = points + sigma**2 * gradient
    torch.testing.assert_close(mixture.denoise(x, sigma, y), tweedie, rtol=1e-9, atol=1e-9)


def test_score_agrees_with_finite_differences(mixture, points):
    x, step = points.flatten(1), 1e-5
    for axis in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[axis] = step
        slope = (mixture.log_density(x + shift) - mixture.log_density(x - shift)) / (2 * step)
        torch.testing.assert_close(mixture.score(x, 0.0)[:, axis], slope, rtol=1e-6, atol=1e-6)


def test_denoiser_is_the_posterior_mean_by_monte_carlo():
    mixture = GaussianMixture(
        torch.ones(2), torch.tensor([[1.0], [-1.0]]), torch.tensor([[[0.04]], [[0.09]]])
    )
    x0 = mixture.sample(400_000, Draws(0, 400_000))[0].double().flatten()
    x, sigma = 0.3, 0.6
    weights = (-((x - x0) ** 2) / (2 * sigma**2)).exp()  # importance weights of the prior's draws
    expected = ((weights * x0).sum() / weights.sum()).item()
    assert mixture.denoise(torch.tensor([[x]]).double(), sigma).item() == pytest.approx(expected, abs=5e-3)


def test_each_row_has_its_own_sigma(mixture, points):
    sigma = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
    rows = torch.cat([mixture.denoise(points[i : i + 1], float(sigma[i])) for i in range(6)])
    torch.testing.assert_close(mixture.denoise(points, sigma), rows, rtol=1e-6, atol=1e-7)


def test_class_logits_are_bayes_rule(mixture, points):
    joint = torch.stack([scipy_log_density(mixture, points, k, 1.0, 0.3) for k in range(3)], 1)
    joint = joint.exp() * torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    expected = joint / joint.sum(1, keepdim=True)
    torch.testing.assert_close(mixture.class_logits(points, 0.3).exp(), expected, rtol=1e-9, atol=1e-12)


def test_mixture_denoiser_is_the_average_of_the_components(mixture, points):
    parts = [mixture.denoise(points, 0.5, torch.full((6,), k)) for k in range(3)]
    posterior = mixture.class_logits(points, 0.5).exp()
    average = sum(posterior[:, k, None, None, None] * part for k, part in enumerate(parts))
    torch.testing.assert_close(mixture.denoise(points, 0.5), average, rtol=1e-10, atol=1e-10)


def test_noise_level_logits_are_the_log_densities_of_the_levels(mixture, points):
    path = schedules.linear(20)
    logits = mixture.noise_level_logits(points, path)
    for level in range(len(path)):
        alpha, sigma = float(path.alpha[level]), float(path.sigma[level])
        parts = torch.stack([scipy_log_density(mixture, points, k, alpha, sigma) for k in range(3)], 1)
        expected = (parts + mixture.weights.log()).logsumexp(1)
        torch.testing.assert_close(logits[:, level], expected, rtol=1e-9, atol=1e-9)


def test_pure_noise_level_is_the_standard_normal(mixture, points):
    path = schedules.linear(20)
    expected = -(points.flatten(1) ** 2).sum(1) / 2 - 2 * math.log(2 * math.pi)
    torch.testing.assert_close(mixture.noise_level_logits(points, path)[:, path.reference], expected)


def test_log_ratios_of_levels_denoise(mixture, points):
    """E[eps | x_t] = sigma_t (grad_x log p(T + 1 | x) / p(t | x) + x) (Yadin et al. 2024, theorem 3.1)."""
    path = schedules.uniform(50)
    model = mixture.on_path(path)
    level = torch.tensor([1, 5, 10, 20, 30, 50])
    x = points.requires_grad_()
    logits = model.noise_level_logits(x)
    ratio = logits[:, path.reference] - logits.gather(1, level[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(ratio.sum(), x)
    eps = path.sigma[level][:, None, None, None] * (gradient + points)
    ve_x, ve_sigma = path.to_ve(points, level)
    expected = path.x0_to_eps(points, model.denoise(ve_x, ve_sigma), level)
    torch.testing.assert_close(eps, expected, rtol=1e-8, atol=1e-8)


def test_conditional_noise_level_logits_use_the_component(mixture, points):
    path, y = schedules.uniform(5), torch.tensor([2, 1, 0, 2, 1, 0])
    logits = mixture.noise_level_logits(points, path, y)
    torch.testing.assert_close(logits[:, path.clean], mixture.log_density(points, y), rtol=1e-10, atol=1e-10)


def test_denoiser_can_be_differentiated_twice(mixture):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: mixture.log_density(x, sigma=0.5), x)


def test_float32_in_float32_out_computed_in_float64(mixture, points):
    single = mixture.denoise(points.float(), torch.full((6,), 0.5))
    assert single.dtype == torch.float32
    exact = mixture.denoise(points.float().double(), 0.5)
    assert torch.equal(single, exact.float())


def test_samples_have_the_moments_of_the_mixture(mixture):
    x, y = mixture.sample(200_000, Draws(3, 200_000))
    x = x.flatten(1).double()
    torch.testing.assert_close(torch.bincount(y).double() / len(y), mixture.weights, rtol=0, atol=5e-3)
    for k in range(3):
        part = x[y == k]
        torch.testing.assert_close(part.mean(0), mixture.means[k], rtol=0, atol=0.03)
        torch.testing.assert_close(part.T.cov(), mixture.covariances[k], rtol=0.03, atol=0.03)


def test_a_sample_does_not_depend_on_how_its_rows_are_spread(mixture):
    whole, _ = mixture.sample(10, Draws(0, 10))
    part, _ = mixture.sample(4, Draws(0, 10, 3, 7))
    assert torch.equal(part, whole[3:7])


def test_capabilities(mixture):
    assert capabilities.offered(mixture) == {"denoise", "class_logits", "log_density"}
    model = mixture.on_path(schedules.linear(5))
    assert capabilities.offered(model) == {"denoise", "class_logits", "log_density", "noise_level_logits"}
    assert isinstance(mixture, capabilities.Denoiser)
    assert isinstance(model, capabilities.NoiseLevelLogits)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        (torch.ones(2), torch.zeros(3, 1), torch.ones(3, 1, 1), "weights"),
        (torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.ones(2, 1, 1), "weights must be > 0"),
        (torch.ones(1), torch.zeros(1), torch.ones(1, 1, 1), "means must be"),
        (torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), "symmetric"),
        (torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), "positive definite"),
    ],
)
def test_bad_parameters_are_refused(weights, means, covariances, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(weights, means, covariances)


def test_bad_arguments_are_refused(mixture, points):
    with pytest.raises(ValueError, match="4 dimensions"):
        mixture.log_density(points[:, :, :1])
    with pytest.raises(ValueError, match="int64"):
        mixture.log_density(points, torch.full((6,), 0.5))
    with pytest.raises(ValueError, match=r"0 \.\. 2"):
        mixture.denoise(points, 0.5, torch.full((6,), 3))
    with pytest.raises(ValueError, match="rows"):
        mixture.sample(5, Draws(0, 6))
