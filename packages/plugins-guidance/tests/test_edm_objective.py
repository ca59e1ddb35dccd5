"""EDM's objective against its published form."""

from __future__ import annotations

import pytest
import torch

from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_plugins_guidance.edm_configs import EDMObjectiveConfig
from cdm_plugins_guidance.edm_objective import EDMObjective


class Half(torch.nn.Module):
    """D(x) = x / 2, for noise from 0.01 to 20."""

    sigma_range = (0.01, 20.0)
    num_classes = null_label = None

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x / 2


def test_levels_are_log_normal_and_the_noise_is_theirs() -> None:
    x0 = torch.zeros(4000, 1, 2, 2)
    objective = EDMObjective(EDMObjectiveConfig(P_mean=-0.5, P_std=0.7))
    _, x, sigma, y = objective.prepare(Half(), x0, None, Draws(0, 4000))
    assert y is None
    assert float(sigma.log().mean()) == pytest.approx(-0.5, abs=0.05)
    assert float(sigma.log().std()) == pytest.approx(0.7, abs=0.04)
    noise = x / sigma[:, None, None, None]
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    kept = EDMObjective(EDMObjectiveConfig(P_mean=9.0)).prepare(Half(), x0, None, Draws(0, 4000))[2]
    assert float(kept.max()) == pytest.approx(20.0)


def test_the_loss_is_the_published_one() -> None:
    """lambda |F - target|^2 with the target (x0 - c_skip x) / c_out and lambda c_out^2 = 1 (their eq. 8)."""
    config = EDMObjectiveConfig(sigma_data=0.4)
    x0 = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective = EDMObjective(config)
    found = objective(Half(), x0, None, Draws(3, 6))
    _, x, sigma, _ = objective.prepare(Half(), x0, None, Draws(3, 6))
    rows = sigma[:, None, None, None]
    total = rows**2 + 0.4**2
    c_skip, c_out = 0.4**2 / total, rows * 0.4 / total.sqrt()
    network, target = ((d - c_skip * x) / c_out for d in (x / 2, x0))
    torch.testing.assert_close(found["loss"], (network - target).square().mean())
    torch.testing.assert_close(found["mse"], (x / 2 - x0).square().mean())


def test_discrete_levels_are_refused() -> None:
    with pytest.raises(UserError, match="denoisers of any noise level"):
        EDMObjective(EDMObjectiveConfig())(torch.nn.Linear(1, 1), torch.zeros(1, 1, 1, 1), None, Draws(0, 1))
