"""Settings of the diffusion classifier: its estimator, and how classes are given up. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

Design = Literal["iid", "grid", "stratified", "vdc", "systematic"]
Loss = Literal["l2", "l1", "huber"]
Weight = Literal["simple", "elbo", "heuristic", "learned"]
Importance = Literal["uniform", "weight", "table"]
Rule = Literal["none", "stages", "halving", "race"]
Spacing = Literal["log", "linear"]
Wordings = Literal["mean", "likelihood"]


@dataclass(frozen=True)
class EstimatorConfig:
    """Which (level, noise) pairs every class of an image is asked about, and what an error counts.

    design, of the pairs' places on the scale of levels, [0, 1): `iid`, uniform; `grid`, `pairs` places evenly
    spaced, the same for every image; `stratified`, one place at random in each of `pairs` equal parts; `vdc`,
    the van der Corput sequence shifted at random, once an image; `systematic`, `block` places evenly spaced,
    shifted at random once a block, which makes the means of blocks independent. Grid and strata are visited
    in van der Corput order: every prefix covers the scale evenly.
    """

    pairs: int = 100  # an image, at most
    design: Design = "vdc"
    antithetic: bool = False  # pairs 2 i and 2 i + 1 share their level and have opposite noise
    block: int = 4  # pairs between two looks of a race; strata of its variance
    loss: Loss = "l2"  # of the error of eps, a mean over pixels; only l2 has a meaning as a likelihood
    # simple: 1. elbo: nats of the likelihood bound. heuristic: exp(-rate t) on the error of x0, t in (0, 1]
    # (Clark & Jaini 2023). learned: `bins`.
    weight: Weight = "simple"
    rate: float = 7.0
    bins: tuple[float, ...] = ()  # weights of equal parts of the levels, clean to noisy
    importance: Importance = "uniform"  # levels in proportion to: 1; their weight; `proposal`
    proposal: tuple[float, ...] = ()  # densities of equal parts of the levels, clean first, up to a factor
    # elbo: noise std, VE units, of the level at which the chain ends, below the model's lowest; 0: as the
    # model says (attribute `sigma_clean`), else its lowest level, where the network is then not asked.
    sigma_clean: float = 0.0
    # Levels of a model that takes any noise: as many, from the least to the most, even in `spacing` of sigma.
    levels: int = 1000
    sigma_min: float = 0.01
    sigma_max: float = 80.0
    spacing: Spacing = "log"
    # Of a class that is asked about in several wordings (prompts): the mean of their losses, or, where the
    # weight is elbo, the likelihood of their mixture in equal parts.
    wordings: Wordings = "mean"
    seed: int = 0
    # Rows of every call of the network, the last ones filled up: rounding depends on the shape of a batch,
    # and this way on nothing else. Part of what decides a result bit for bit, as `in_flight` is not.
    tile: int = 64
    in_flight: int = 64  # images that share batches
    precision: Literal["no", "bf16", "fp16"] = "no"  # of the network; errors are always float32

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        for name in ("pairs", "block", "levels", "tile", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.antithetic and (self.block % 2 or self.pairs % 2):
            raise ValueError(
                "antithetic pairs come in twos: block and pairs must be even, "
                f"not {self.block} and {self.pairs}"
            )
        if self.weight == "elbo" and self.loss != "l2":
            raise ValueError(
                f"the likelihood bound is of the squared error: loss must be l2, not {self.loss}"
            )
        if self.wordings == "likelihood" and self.weight != "elbo":
            raise ValueError(
                f"wordings = likelihood mixes likelihoods: weight must be elbo, not {self.weight}"
            )
        if (self.weight == "learned") != bool(self.bins) or not all(map(math.isfinite, self.bins)):
            raise ValueError(
                f"bins hold the finite weights of weight = learned, and only its; got {self.bins}"
            )
        if (self.importance == "table") != bool(self.proposal) or any(
            not 0 < p < math.inf for p in self.proposal
        ):
            raise ValueError(
                "proposal holds the densities, finite and above 0, of importance = table, and only its; "
                f"got {self.proposal}"
            )
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max < inf, not {self.sigma_min} and {self.sigma_max}"
            )
        for name in ("rate", "sigma_clean"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class EliminationConfig:
    """When a class of an image is given up.

    none: never, every class gets every pair. stages: after `stage_pairs` pairs keep the best `stage_keep`
    (Li et al. 2023; the pairs of a stage are among those of the next). halving: after `first`, 2 `first`,
    4 `first`, ... pairs keep the better half. race: at the end of every block from `n_min` pairs on, drop
    what a paired t-test finds worse than the best (Clark & Jaini 2023).
    """

    rule: Rule = "race"
    stage_pairs: tuple[int, ...] = ()  # ascending, the last one all of the estimator's pairs
    stage_keep: tuple[int, ...] = ()  # descending to `top_k`
    first: int = 1
    n_min: int = 8
    alpha: float = 1e-3  # of one one-sided test; 0: no class is ever dropped
    # Variance of a mean of differences: `pooled`, within the strata of a block; `blocks`, between the means
    # of whole blocks.
    variance: Literal["pooled", "blocks"] = "pooled"
    top_k: int = 1  # classes wanted: a race goes on until so many are left
    confidence: float = 0.95  # of the intervals that are reported

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if self.rule == "stages":
            self._check_stages()
        elif self.stage_pairs or self.stage_keep:
            raise ValueError(f"stage_pairs and stage_keep belong to rule = stages, not to {self.rule}")
        if self.first < 1 or self.top_k < 1:
            raise ValueError(f"first and top_k must be at least 1, not {self.first} and {self.top_k}")
        if self.n_min < 2:
            raise ValueError(f"n_min must be at least 2, not {self.n_min}: one pair has no variance")
        if not 0 <= self.alpha < 0.5:
            raise ValueError(f"alpha must lie in [0, 0.5), not {self.alpha}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie in (0, 1), not {self.confidence}")

    def _check_stages(self) -> None:
        pairs, keep = self.stage_pairs, self.stage_keep
        if not pairs or len(pairs) != len(keep):
            raise ValueError(
                "stage_pairs and stage_keep need as many entries, at least 1; "
                f"got {len(pairs)} and {len(keep)}"
            )
        if pairs[0] < 1 or any(b <= a for a, b in pairwise(pairs)):
            raise ValueError(f"stage_pairs must ascend from at least 1, not {pairs}")
        if any(b > a for a, b in pairwise(keep)) or keep[-1] != self.top_k:
            raise ValueError(f"stage_keep must descend to top_k = {self.top_k}, not {keep}")


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of `adapter.DiffusionClassifier`: logits are scores over a temperature."""

    estimator: EstimatorConfig = field(
        default_factory=lambda: EstimatorConfig(weight="elbo", importance="weight")
    )
    elimination: EliminationConfig = field(default_factory=EliminationConfig)
    temperature: float = 1.0  # of the scores, nats where the weight is elbo

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        self.estimator.check()
        self.elimination.check()
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and above 0, not {self.temperature}")


# The published stages (Li et al. 2023, commands of the release), by data set: pairs, classes kept.
OFFICIAL_STAGES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "cifar10": ((50, 500), (5, 1)),
    "stl10": ((100, 500), (5, 1)),
    "pets": ((25, 250), (5, 1)),
    "food": ((20, 50, 100, 500), (20, 10, 5, 1)),
    "aircraft": ((20, 50, 100, 500), (20, 10, 5, 1)),
    "flowers": ((20, 50, 100, 500), (20, 10, 5, 1)),
    "objectnet": ((50, 100, 500, 1000), (25, 10, 5, 1)),
    "imagenet": ((50, 100, 500, 1000), (500, 50, 10, 1)),
}
