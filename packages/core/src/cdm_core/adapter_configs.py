"""Settings of the adapters, apart from `cdm_core.adapters` so that listing them never imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CFGConfig:
    """Settings of `adapters.ClassifierFreeGuidance`."""

    weight: float = 0.5  # w in (1 + w) D(x, y) - w D(x); 0: plain conditional prediction


@dataclass(frozen=True)
class BayesConfig:
    """Settings of `adapters.BayesClassifier`."""

    prior: tuple[float, ...] = ()  # p(y) up to a factor, one a class; empty: uniform

    def check(self) -> None:
        if any(not 0.0 < p < float("inf") for p in self.prior):
            raise ValueError("prior must hold positive, finite numbers, one a class")
