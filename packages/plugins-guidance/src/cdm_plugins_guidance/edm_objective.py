"""How EDM trains a denoiser of any noise level (Karras et al. 2022, table 1 and equation 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cdm_core.denoising import drop_labels
from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_plugins_guidance.edm_configs import EDMObjectiveConfig


class EDMObjective:
    """`objective(model, x0, y, draws) -> {"loss", "mse"}`: weighted squared error of D(x0 + sigma n; sigma).

    log sigma ~ N(P_mean, P_std^2), kept to the model's range; weight (sigma^2 + sigma_data^2) / (sigma
    sigma_data)^2, which makes every level's error one of order 1. `mse` is without the weight, in data units.
    In order, `draws` gives the levels, the noise and, where the model has a label for "no class", the coin.
    """

    def __init__(self, config: EDMObjectiveConfig) -> None:
        self.config = config

    def __call__(self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws) -> dict[str, Tensor]:
        """x0 (B, C, H, W) float32 in model units; y (B,) int64 or None, unused by a model without classes."""
        return self.loss(model, *self.prepare(model, x0, y, draws))

    def prepare(
        self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Everything random: x0, x0 + sigma n (B, C, H, W), sigma (B,), classes (B,) or None."""
        if not hasattr(model, "sigma_range"):
            raise UserError("the objective edm trains denoisers of any noise level, not of discrete ones")
        low, high = model.sigma_range
        sigma = (self.config.P_mean + self.config.P_std * draws.normal()).exp().clamp(low, high).to(x0.dtype)
        noisy = x0 + sigma[:, None, None, None] * draws.normal(*x0.shape[1:]).to(x0.dtype)
        return x0, noisy, sigma, drop_labels(model, y, draws, self.config.label_dropout)

    def loss(self, model: Any, x0: Tensor, x: Tensor, sigma: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        """The losses of what `prepare` returned; tensor operations only."""
        error = (model.denoise(x, sigma, y) - x0).square().flatten(1).mean(1)
        data = self.config.sigma_data
        weight = (sigma**2 + data**2) / (sigma * data) ** 2
        return {"loss": (weight * error).mean(), "mse": error.detach().mean()}
