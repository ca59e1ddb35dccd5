"""Settings of the context U-Net. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GROUPS = 8  # of its group normalisations


@dataclass(frozen=True)
class ContextUnetConfig:
    """`zeroshot/context-unet`: the network, and the noise levels that it is trained on."""

    n_feat: int = 128  # base width; 256 in Svithjod's training script, 128 in TeaPearce's
    n_T: int = 400  # noise levels; beta runs over n_T + 1 of them, the first of which nothing is trained on
    beta_start: float = 1e-4  # beta at level 0
    beta_end: float = 0.02  # beta at level n_T
    sign: Literal[-1, 1] = -1  # of the one-hot class that enters; the published networks know minus one

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if self.n_feat < GROUPS or self.n_feat % GROUPS:
            raise ValueError(f"n_feat must be a multiple of {GROUPS}, not {self.n_feat}")
        if self.n_T < 2:
            raise ValueError(f"n_T must be at least 2, not {self.n_T}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"need 0 < beta_start <= beta_end < 1, not {self.beta_start} and {self.beta_end}"
            )

    @classmethod
    def small(cls) -> ContextUnetConfig:
        """A net that tests can afford."""
        return cls(n_feat=8, n_T=20)
