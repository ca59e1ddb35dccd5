"""Settings of the samplers, apart from `cdm_core.samplers` so that listing them never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DDIMConfig:
    """Settings of `samplers.ddim`."""

    eta: float = 0.0  # share of fresh noise: 0 deterministic, 1 ancestral

    def check(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], not {self.eta}")


@dataclass(frozen=True)
class DDPMConfig:
    """Settings of `samplers.ddpm`."""

    # Exact for one point | for unit-variance data | as the model learned it | learned if it was, else small.
    variance: Literal["auto", "small", "large", "learned"] = "auto"


@dataclass(frozen=True)
class ChurnConfig:
    """Settings of `samplers.euler` and `samplers.heun`: Karras et al. 2022, Algorithm 2."""

    churn: float = 0.0  # S_churn: fresh noise over the whole trajectory; 0: deterministic
    churn_min: float = 0.0  # S_tmin: no churn below this sigma
    churn_max: float = float("inf")  # S_tmax: nor above this one
    churn_noise: float = 1.0  # S_noise: standard deviation of the fresh noise

    def check(self) -> None:
        if not (self.churn >= 0.0 and 0.0 <= self.churn_min <= self.churn_max and self.churn_noise > 0.0):
            raise ValueError("churn and churn_min must be >= 0, churn_max >= churn_min, churn_noise > 0")
