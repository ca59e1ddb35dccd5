"""Settings of exact Bayes classification, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ExactBayesConfig:
    """What is scored, and how the classes' unknown normalisers are put right.

    none: the densities as they are. mean: every class less its mean score over held-out images, whose labels
    are not looked at; right where the classes are about equally frequent and equally easy to describe.
    labels: a scale a level and an offset a class and level, of least log-loss on labelled held-out images.
    """

    sigmas: tuple[float, ...] = (0.1, 0.2, 0.3)  # noise levels, std in data units; 0: clean images
    draws: int = 1  # of dequantisation and noise, an image and level
    # How draws are averaged: `density`, log-mean-exp, which at level 0 is the probability of the grey levels;
    # `log`, the logarithms; `auto`, densities at level 0 and logarithms at the others, where each draw is
    # another image and the densest one would speak for all.
    pool: Literal["auto", "density", "log"] = "auto"
    centre: Literal["none", "mean", "labels"] = "labels"
    seed: int = 0
    tile: int = 128  # rows of every call of the network, the last ones filled up: decides how it rounds

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if not self.sigmas or any(not 0 <= sigma < math.inf for sigma in self.sigmas):
            raise ValueError(
                f"sigmas must be finite noise stds of at least 0, one or more; got {self.sigmas}"
            )
        if len(set(self.sigmas)) < len(self.sigmas):
            raise ValueError(f"sigmas must differ from one another, not be {self.sigmas}")
        for name in ("draws", "tile"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
