"""The diagnostics find nothing wrong with an exact classifier, and find what is wrong with a false one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cdm_core import schedules
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws
from cdm_plugins_cdm import diagnostics

PATHS = [
    schedules.uniform(100),
    schedules.linear(100, 0.001, 0.2),
    schedules.ot(100),
    schedules.ot_official(100, 1e-3),
]


def mixture() -> GaussianMixture:
    means = torch.tensor([[-0.6, 0.3], [0.5, -0.4]])
    covariances = torch.stack([torch.eye(2) * 0.04, torch.tensor([[0.09, 0.03], [0.03, 0.05]])])
    return GaussianMixture(torch.tensor([0.4, 0.6]), means, covariances)


class Classifier:
    """The exact classifier of a mixture's noise levels, its clean density multiplied by exp(`excess`)."""

    def __init__(self, path: schedules.Path, excess: float = 0.0) -> None:
        self.path, self.excess, self.mixture = path, excess, mixture()
        self.reference = path.reference

    def noise_level_logits(self, x: Tensor) -> Tensor:
        logits = self.mixture.noise_level_logits(x, self.path)
        bump = torch.zeros(len(self.path), dtype=logits.dtype)
        bump[self.path.clean] = self.excess
        return logits + bump

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        return self.mixture.denoise(x, sigma, y)


def images(n: int) -> Tensor:
    return mixture().sample(n, Draws(3, n))[0]


@pytest.mark.parametrize("path", PATHS)
def test_the_exact_density_integrates_to_one(path: schedules.Path) -> None:
    model: Any = Classifier(path)
    found = diagnostics.annealed_log_normaliser(model, torch.Size((2, 1, 1)), Draws(0, 256), levels=40)
    assert abs(found.log_z) < max(4 * found.standard_error, 0.02)
    assert found.standard_error < 0.1
    assert found.effective_share > 0.2


@pytest.mark.parametrize("excess", [-1.0, 2.0])
def test_a_density_that_integrates_to_something_else_is_found(excess: float) -> None:
    model: Any = Classifier(PATHS[0], excess)
    found = diagnostics.annealed_log_normaliser(model, torch.Size((2, 1, 1)), Draws(0, 256), levels=40)
    assert found.log_z == pytest.approx(excess, abs=max(4 * found.standard_error, 0.02))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("excess", [0.0, 1.5])
def test_adjacent_ratios_show_the_level_at_fault(path: schedules.Path, excess: float) -> None:
    model: Any = Classifier(path, excess)
    order = diagnostics.by_noise(model)
    ratios = diagnostics.adjacent_log_ratios(model, images(1024), Draws(1, 1024), order[:8], order[1:9])
    assert ratios[0].item() == pytest.approx(excess, abs=0.1)
    assert ratios[1:].abs().max() < 0.1


def test_the_mean_posterior_of_the_exact_classifier_is_the_prior() -> None:
    exact, false = (Classifier(PATHS[0], excess) for excess in (0.0, 1.5))
    means, moved = [], []
    for model in (exact, false):
        x0 = images(1024)
        logits = diagnostics.level_logits(model, x0, Draws(1, 1024), per_level=32)  # type: ignore[arg-type]
        matrix = diagnostics.confusion(logits)
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)))
        means.append(matrix.mean(0) * len(matrix))
        shift = diagnostics.recalibration(logits)
        mean = (logits + shift).softmax(2).mean((0, 1)) * len(matrix)
        torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0.01, atol=0)
        moved.append(float(shift[model.path.clean] - shift[model.reference]))
    assert (means[0] - 1).abs().max() < 0.1
    assert means[1][0] > 2  # the clean level claims more than twice its share
    # Recalibration takes off what was added, up to the error of 1,344 images.
    assert abs(moved[0]) < 0.3
    assert abs(moved[1] + 1.5) < 0.3


def test_level_errors_are_those_of_the_exact_denoiser() -> None:
    """For one Gaussian N(0, s^2) the error of the noise estimate is s^2 / (s^2 + sigma^2) a dimension."""
    path = PATHS[0]
    model: Any = Classifier(path)
    model.mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), 0.25 * torch.eye(2)[None])
    x0 = model.mixture.sample(2048, Draws(3, 2048))[0]
    levels = torch.tensor([2, 12, 32])
    error, deviation = diagnostics.level_errors(model, x0, Draws(2, 2048), levels)
    variance = path.ve_sigma[levels] ** 2
    expected = (0.25 / (0.25 + variance)).float()
    assert ((error - expected).abs() < 5 * deviation).all()
    assert (deviation < 0.03).all()


def test_entropies_fall_with_the_noise_to_the_clean_one() -> None:
    class Scored(Classifier):
        def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
            return self.mixture.log_density(x, y, sigma)

    model: Any = Scored(PATHS[0])
    order = diagnostics.by_noise(model)[:9]
    nats = diagnostics.nats_by_level(model, images(2048), Draws(1, 2048), order)
    x0 = images(2048)
    assert nats[0].item() == pytest.approx(-model.mixture.log_density(x0).mean().item() / 2)
    assert (nats.diff() > 0).all()
