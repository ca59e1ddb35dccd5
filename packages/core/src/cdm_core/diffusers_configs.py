"""Settings of networks of the library `diffusers`. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

Prediction = Literal["epsilon", "sample", "v_prediction"]
Schedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained", "edm"]


@dataclass(frozen=True)
class DiffusersConfig:
    """A network of diffusers and what its scheduler says of the noise that it was trained on.

    Names and values are the library's. schedule: `trained` are the numbers `betas`, `edm` the preconditioning
    of Karras et al. 2022 with `sigma_data`, for any noise from `sigma_min` to `sigma_max`.
    """

    architecture: str = ""  # its config.json, as text
    prediction: Prediction = "epsilon"
    schedule: Schedule = "linear"
    noise_steps: int = 1000  # T
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: tuple[float, ...] = ()
    zero_snr: bool = False  # betas rescaled so that the last level is pure noise
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    autoencoder: str = ""  # folder of the diffusers autoencoder whose latents are denoised; "": none
    latent_scale: float | None = None  # the latents' factor; none: as the autoencoder's config has it
    checkpoint_decoder: bool = False  # gradients through the autoencoder recompute its activations

    @property
    def settings(self) -> dict[str, Any]:
        """The architecture's settings by name."""
        table: dict[str, Any] = json.loads(self.architecture)
        return table

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        try:
            good = not self.architecture or isinstance(self.settings, dict)
        except ValueError:
            good = False
        if not good:
            raise ValueError("architecture must be the text of a config.json of diffusers")
        if self.noise_steps < 2:
            raise ValueError(f"noise_steps must be at least 2, not {self.noise_steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start and beta_end: need 0 < {self.beta_start} <= {self.beta_end} < 1")
        if (self.schedule == "trained") != bool(self.betas) or not all(0 < beta < 1 for beta in self.betas):
            raise ValueError("betas must be numbers between 0 and 1 where schedule is trained, else none")
        if not (self.sigma_data > 0 and 0 < self.sigma_min < self.sigma_max):
            raise ValueError("sigma_data must be above 0, and sigma_max above sigma_min above 0")
        if self.latent_scale is not None and not self.latent_scale > 0:
            raise ValueError(f"latent_scale must be above 0, not {self.latent_scale}")
