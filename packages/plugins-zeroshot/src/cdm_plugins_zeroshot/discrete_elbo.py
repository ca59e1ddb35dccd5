"""The likelihood bound of a discrete chain, all of it: in nats and bits per dimension, with standard errors.

The chain of a model with levels sigma_1 < ... < sigma_T ends at a level sigma_0, and with the posteriors'
variance, in every step, (Kingma et al. 2021, arXiv 2107.00630, equations 11 to 14)

    -log p(x0 | y) <= KL(N(x0, sigma_T^2) | N(0, s^2)) + sum_t d w_t E mean|eps - eps_y|^2 + L_0,
    w_t = 1/2 (sigma_t^2 / sigma_{t-1}^2 - 1).

The first term and L_0 use no network: they are the same for all classes, and are computed exactly. For grey
levels v_k L_0 = E -log p(x0 | z), z = x0 + sigma_0 n, with p(v_k | z) proportional to N(z; v_k, sigma_0^2);
for continuous data p(. | z) is the density N(z, sigma_0^2), and L_0 = d/2 (1 + log 2 pi sigma_0^2).
Where the model says nothing of sigma_0, it is its lowest level, and the sum begins with the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from cdm_core.errors import UserError
from cdm_plugins_zeroshot.estimators import Estimator
from cdm_plugins_zeroshot.factored import factored
from cdm_plugins_zeroshot.race import Integers, Job, Scorer, standard_error
from cdm_plugins_zeroshot.zeroshot_configs import EstimatorConfig

NODES = torch.linspace(-8, 8, 401, dtype=torch.float64)  # where E over n ~ N(0, 1) is summed, exact to 1e-12


@dataclass(frozen=True)
class Bound:
    """The upper bound of -log p(x0 | y) of one image, in nats."""

    image: int
    prior: float  # the divergence of the chain's start, exact
    steps: float  # the sum over levels, estimated without bias
    last: float  # L_0, exact
    error: float  # standard error of `steps`, and so of the bound
    low: float  # the bound's interval, of Student's t
    high: float

    @property
    def nats(self) -> float:
        """The bound."""
        return self.prior + self.steps + self.last

    def bits_per_dim(self, dim: int) -> float:
        """The bound over d log 2, for grey levels; of continuous data see `DataInfo.bits_per_dim`."""
        return self.nats / (dim * math.log(2))


def prior_term(x0: Tensor, sigma: float, start: float) -> Tensor:
    """KL(N(x0, sigma^2) | N(0, start^2)) in nats, (B,) float64; x0 (B, C, H, W), levels in VE units."""
    ratio = (sigma / start) ** 2
    squares = x0.double().flatten(1).square().sum(1)
    return 0.5 * (x0[0].numel() * (ratio - 1 - math.log(ratio)) + squares / start**2)


def last_term(x0: Tensor, sigma: float, grey_levels: int | None) -> Tensor:
    """L_0 of images x0 (B, C, H, W) in model units at the chain's last level sigma: nats, (B,) float64.

    grey_levels: of the data, evenly from -1 to 1, where x0 must lie (`UserError`); None: continuous data.
    """
    if grey_levels is None:
        return x0.new_full((len(x0),), last_density(sigma) * x0[0].numel(), dtype=torch.float64)
    value = (x0.double() + 1) / 2 * (grey_levels - 1)
    level = value.round()
    if float((value - level).abs().max()) > 1e-3 or level.min() < 0 or level.max() > grey_levels - 1:
        raise UserError(
            f"the bound of {grey_levels} grey levels needs images on them, and these lie between "
            "(dequantised?): ask for the bound of continuous data"
        )
    return grey_level_terms(sigma, grey_levels).to(x0.device)[level.long()].flatten(1).sum(1)


def last_density(sigma: float) -> float:
    """L_0 of continuous data, nats a dimension."""
    return 0.5 * (1 + math.log(2 * math.pi * sigma**2))


@lru_cache(maxsize=16)
def grey_level_terms(sigma: float, grey_levels: int) -> Tensor:
    """L_0 of each level k, E_n log sum_j exp(-((v_k - v_j) / sigma + n)^2 / 2 + n^2 / 2), float64."""
    density = torch.exp(-0.5 * NODES.square())
    density = density / density.sum()
    values = torch.linspace(-1, 1, grey_levels, dtype=torch.float64) / sigma
    terms = []
    for value in values:
        away = value - values[:, None]  # (levels, 1) against the nodes
        terms.append(torch.logsumexp(-away * (away / 2 + NODES), 0) @ density)
    return torch.stack(terms)


def chain_end(model: Any, estimator: Estimator) -> tuple[float, float, float]:
    """sigma_0, sigma_T and s, the std of the chain's start, N(0, I) in the path's own scale; VE units."""
    top = float(estimator.sigmas[-1])
    scale = getattr(model, "scale", None)
    start = top if scale is None else 1 / float(scale(torch.tensor([top], dtype=torch.float64)))
    return estimator.sigma_clean or float(estimator.sigmas[0]), top, start


def class_free(model: Any, estimator: Estimator, x0: Tensor, grey_levels: int | None) -> Tensor:
    """The bound's terms that no class changes, (B,) float64 nats; x0 (B, C, H, W).

    With weight `elbo`, they less a verdict's `scores` are the bounds of -log p(x0 | y).
    """
    clean, top, start = chain_end(model, estimator)
    return prior_term(x0, top, start) + last_term(x0, clean, grey_levels)


def bounds(
    model: Any,
    images: Iterable[tuple[int, Tensor, int | None]],
    config: EstimatorConfig,
    shape: tuple[int, ...],
    *,
    grey_levels: int | None = None,
    variance: str = "pooled",
    confidence: float = 0.95,
) -> Iterator[Bound]:
    """The bound of each image (number, x0 (C, H, W) in model units, class or None), in their order.

    config: with weight `elbo` (`UserError`); design `systematic`, whose standard error is honest, and
    importance `weight` are the ones to use. A class of None is the model's own "no class". variance: as in
    `standard_error`.
    """
    if config.weight != "elbo":
        raise UserError(f"the likelihood bound has its own weight: weight must be elbo, not {config.weight}")
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode: call eval() first")
    config.check()
    estimator = Estimator.of(model, config, shape)
    scorer = Scorer(factored(model), estimator, _labels(model))
    clean, top, start = chain_end(model, estimator)
    source = iter(images)
    while group := list(islice(source, config.in_flight)):
        jobs = [Job(image, x0, 0, config.pairs, _asked(model, label)) for image, x0, label in group]
        x0 = torch.stack([job.x0 for job in jobs])
        priors, lasts = prior_term(x0, top, start), last_term(x0, clean, grey_levels)
        answers = scorer(jobs)
        for job, (losses, weights), prior, last in zip(jobs, answers, priors, lasts, strict=True):
            values = losses.astype(np.float64) * weights
            steps, (error, df) = float(values.mean()), standard_error(values, config, variance)
            reach = float(stdtrit(df, (1 + confidence) / 2) * error[0]) if df else math.inf
            nats = float(prior) + steps + float(last)
            yield Bound(
                job.image, float(prior), steps, float(last), float(error[0]), nats - reach, nats + reach
            )


def _labels(model: Any) -> list[int] | None:
    """What the model can be asked with, "no class" last; None: it knows no classes."""
    classes: int | None = getattr(model, "num_classes", None)
    if not classes:
        return None
    null: int | None = getattr(model, "null_label", None)
    return list(range(classes)) if null is None else [*range(classes), null]


def _asked(model: Any, label: int | None) -> Integers:
    """The index into `_labels` of a class; `UserError` on one that the model does not know."""
    classes: int | None = getattr(model, "num_classes", None)
    if not classes and label is None:
        return np.array([0])
    if classes and label is None and getattr(model, "null_label", None) is not None:
        return np.array([classes])
    if classes and label is not None and 0 <= label < classes:
        return np.array([label])
    known = f"classes 0 to {classes - 1}" if classes else "no classes"
    raise UserError(f"the bound of class {label}: the model knows {known}")
