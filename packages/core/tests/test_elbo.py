"""The bound is a bound, is tight for an exact denoiser on a fine chain, and loosens for a wrong one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cdm_core import schedules
from cdm_core.elbo import elbo
from cdm_core.mixtures import GaussianMixture
from cdm_core.random import Draws

N = 4000


def mixture() -> GaussianMixture:
    means = torch.tensor([[-0.6, 0.3], [0.5, -0.4]])
    covariances = torch.stack([torch.eye(2) * 0.04, torch.tensor([[0.09, 0.03], [0.03, 0.05]])])
    return GaussianMixture(torch.tensor([0.4, 0.6]), means, covariances)


def gap(levels: int, pairs: int, shrink: float = 1.0) -> tuple[float, float]:
    """Mean of log p(x0) minus the bound, nats, and its standard error; `shrink` spoils the denoiser."""
    truth = mixture()
    x0 = truth.sample(N, Draws(0, N))[0]
    path = schedules.uniform(levels)
    sigmas = path.ve_sigmas
    start = 1 / float(path.scale(sigmas[-1:]))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return shrink * truth.denoise(x, sigma)

    difference = truth.log_density(x0).double() - elbo(denoise, x0, sigmas, start, Draws(1, N), pairs=pairs)
    return float(difference.mean()), float(difference.std() / N**0.5)


def test_an_exact_denoiser_on_a_fine_chain_loses_almost_nothing() -> None:
    mean, error = gap(1000, 33)
    assert -4 * error < mean < 0.02 + 4 * error
    assert error < 0.05


def test_a_coarse_chain_loses_more_but_stays_a_bound() -> None:
    mean, error = gap(10, 33)
    assert mean > 4 * error


def test_a_wrong_denoiser_is_found_out() -> None:
    (exact, _), (wrong, error) = gap(1000, 33), gap(1000, 33, shrink=0.9)
    assert wrong > exact + 5 * error


@pytest.mark.parametrize("pairs", [2, 3, 9])
def test_the_number_of_pairs_changes_the_spread_not_the_mean(pairs: int) -> None:
    (few, few_error), (many, many_error) = gap(200, pairs), gap(200, 65)
    assert abs(few - many) < 4 * (few_error**2 + many_error**2) ** 0.5


def test_one_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pairs"):
        elbo(lambda x, sigma: x, torch.zeros(2, 1, 1, 1), torch.tensor([0.1, 1.0]), 1.0, Draws(0, 2), pairs=1)
