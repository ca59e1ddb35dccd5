"""With an exact classifier both theorems give the truth, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cdm_core import schedules
from cdm_core.errors import UserError
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws
from cdm_plugins_cdm.model import NoiseLevelClassifier

PATHS = {
    "linear": schedules.linear(50),
    "cosine": schedules.cosine(50),
    "uniform": schedules.uniform(50),
    "ot": schedules.ot(50),
    "ot_official": schedules.ot_official(50),
    "constant_difficulty": schedules.constant_difficulty(50, 0.02),
}
CLASSES = 3


def mixture() -> GaussianMixture:
    means = torch.tensor([[1.0, -0.5], [-1.0, 0.25], [0.0, 1.5]])
    factors = torch.tensor([[[0.3, 0.0], [0.1, 0.2]], [[0.4, 0.0], [-0.2, 0.3]], [[0.1, 0.0], [0.0, 0.5]]])
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2]), means, factors @ factors.mT)


class Exact(NoiseLevelClassifier):
    """The features are the exact log-ratios of adjacent levels, and the head passes them on."""

    def __init__(self, path: schedules.Path, conditional: bool) -> None:
        super().__init__(path, len(path), CLASSES if conditional else None)
        self.double()
        with torch.no_grad():
            self.linear_layer.weight.copy_(torch.eye(len(path)))
        self.mixture = mixture()

    def features(self, x_t: Tensor, y: Tensor | None = None) -> Tensor:
        known = None if y is None or bool((y == self.null_label).all()) else y
        logits = self.mixture.noise_level_logits(x_t, self.path, known)
        return torch.diff(logits, dim=1, prepend=torch.zeros_like(logits[:, :1]))


def noisy_points(path: schedules.Path) -> tuple[Tensor, Tensor, Tensor]:
    """x in VE units at every level in turn, its sigma, and a class."""
    sigma = path.ve_sigmas
    draws = Draws(0, len(sigma))
    x0, y = mixture().sample(len(sigma), draws)
    return x0.double() + sigma.view(-1, 1, 1, 1) * draws.normal(2, 1, 1).double(), sigma, y


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", PATHS)
def test_denoiser_is_the_posterior_mean(name: str, conditional: bool) -> None:
    x, sigma, y = noisy_points(PATHS[name])
    labels = y if conditional else None
    with torch.no_grad():
        denoised = Exact(PATHS[name], conditional).denoise(x, sigma, labels)
    assert (denoised - mixture().denoise(x, sigma, labels)).abs().max() < 1e-8


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", PATHS)
def test_likelihood_at_every_level_is_exact(name: str, conditional: bool) -> None:
    x, sigma, y = noisy_points(PATHS[name])
    labels = y if conditional else None
    model = Exact(PATHS[name], conditional)
    exact = mixture().log_density(x, labels, sigma)
    assert (model.log_density(x, labels, sigma) - exact).abs().max() < 1e-8


@pytest.mark.parametrize("name", PATHS)
def test_likelihood_of_clean_data_is_exact(name: str) -> None:
    x0, _ = mixture().sample(40, Draws(1, 40))
    path = PATHS[name]
    # The official straight path stops at sigma_min: its "clean" level is that one.
    left = path.ve_sigma[path.clean]
    exact = mixture().log_density(x0.double(), sigma=left)
    assert (Exact(path, False).log_density(x0.double()) - exact).abs().max() < 1e-8


def test_sigma_is_rounded_to_the_nearest_level() -> None:
    path = PATHS["linear"]
    x, sigma, _ = noisy_points(path)
    model = Exact(path, False)
    torch.testing.assert_close(model.denoise(x, sigma * 1.0001), model.denoise(x, sigma))


def test_denoiser_can_be_differentiated_where_its_input_can() -> None:
    """Guidance through the denoiser needs its Jacobian."""
    path = PATHS["uniform"]
    x, sigma, _ = noisy_points(path)
    x, sigma = x[20:22].requires_grad_(), sigma[20:22]
    (ours,) = torch.autograd.grad(Exact(path, False).denoise(x, sigma).square().sum(), x)
    (truth,) = torch.autograd.grad(mixture().denoise(x, sigma).square().sum(), x)
    torch.testing.assert_close(ours, truth)


def test_inference_mode_is_refused_in_words() -> None:
    x, sigma, _ = noisy_points(PATHS["ot"])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        Exact(PATHS["ot"], False).denoise(x, sigma)


def test_a_path_without_pure_noise_is_refused() -> None:
    sigma = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    path = schedules.Path(torch.ones_like(sigma), sigma)
    with pytest.raises(UserError, match="pure noise"):
        NoiseLevelClassifier(path, 4)
