"""Exact Bayes classification: a model that knows log p(x | y) classifies in one pass a class.

    log p(y | x) = log p(x | y) + log p(y) - log sum_k p(x | k) p(k)

needs no Monte Carlo over noise levels, which is all that a diffusion classifier does: a classification
diffusion model (Yadin et al. 2024, arXiv 2402.10095) reads log p(x | y; sigma) off one forward pass.

What stands in the way is that such a density is not normalised by construction: the model knows
log p(x | y; sigma) + b_y(sigma), and at the clean level the b of two classes may lie many nats apart. They do
not depend on x, so labelled held-out images find them: `Centring`. With several noise levels, each is put on
its own scale and offsets first; their mean is then a pool of opinions of equal rank, the geometric mean of
posteriors. At level 0 of images with grey levels, log-mean-exp over dequantisation draws is the probability
of the integers themselves (Theis et al. 2016, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_core import capabilities
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.random import fold
from cdm_core.runs import ImageDraws
from cdm_plugins_zeroshot.bayes_configs import ExactBayesConfig
from cdm_plugins_zeroshot.calibration import Affine, fit_offsets, log_softmax

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class ExactBayes:
    """Class scores of images under a model with `log_density` and labels; `UserError` where it has neither.

    model: in evaluation mode, on `device`, with `num_classes`; info: how its images are dequantised.
    """

    def __init__(
        self,
        model: Any,
        info: DataInfo,
        config: ExactBayesConfig,
        *,
        device: torch.device | str = "cpu",
        name: str = "the model",
    ) -> None:
        config.check()
        capabilities.require(model, ["log_density"], user="exact Bayes classification", model_name=name)
        classes: int | None = getattr(model, "num_classes", None)
        if not classes:
            raise UserError(
                f"exact Bayes classification needs a class-conditional model: {name} has no labels"
            )
        self.model, self.info, self.config, self.device = model, info, config, device
        self.classes = classes

    @property
    def passes(self) -> int:
        """Passes of the network that an image costs."""
        return self.classes * sum(self.draws(sigma) for sigma in self.config.sigmas)

    def draws(self, sigma: float) -> int:
        """Draws at a level: one where nothing is random."""
        return self.config.draws if sigma > 0 or self._dequantises else 1

    @property
    def _dequantises(self) -> bool:
        return self.info.dequantise and self.info.levels is not None

    def scores(self, x0: Tensor, numbers: Tensor) -> Floats:
        """log p(x | y; sigma) up to a number a class and level, nats, (N, levels, K).

        x0 (N, C, H, W) in model units, on the CPU; numbers (N,) int64: what an image's draws are keyed by,
        with the seed and the level. The first draw takes x0 as it is dequantised already.
        """
        levels = [self._level(x0, numbers.tolist(), sigma) for sigma in self.config.sigmas]
        return np.stack(levels, 1)

    def _level(self, x0: Tensor, numbers: list[int], sigma: float) -> Floats:
        """(N, K), pooled over the draws."""
        drawn = [
            self._densities(self._drawn(x0, numbers, sigma, draw), sigma) for draw in range(self.draws(sigma))
        ]
        parts = torch.stack(drawn).double()
        if self.config.pool == "log" or (self.config.pool == "auto" and sigma > 0):
            return parts.mean(0).numpy()
        return (parts.logsumexp(0) - np.log(len(parts))).numpy()

    def _drawn(self, x0: Tensor, numbers: list[int], sigma: float, draw: int) -> Tensor:
        seed = self.config.seed
        if draw and self._dequantises:
            draws = ImageDraws(fold(seed, "dequantise again", draw), numbers)
            x0 = self.info.to_model(self.info.to_pixels(x0), draws)
        if sigma == 0:
            return x0
        noise = ImageDraws(fold(seed, "exact Bayes", repr(sigma), draw), numbers).normal(*x0.shape[1:])
        return x0 + sigma * noise

    @torch.no_grad()
    def _densities(self, x: Tensor, sigma: float) -> Tensor:
        """log p(x | y; sigma) of every class, (N, K), in calls of exactly `tile` rows (image, class)."""
        total, tile, found = len(x) * self.classes, self.config.tile, []
        level = None if sigma == 0 else torch.full((tile,), sigma, device=self.device)
        for start in range(0, total, tile):
            row = torch.arange(start, start + tile)
            row = torch.where(row < total, row, 0)
            rows, y = x[row // self.classes].to(self.device), (row % self.classes).to(self.device)
            found.append(self.model.log_density(rows, y, level))
        return torch.cat(found)[:total].view(len(x), self.classes).cpu()


@dataclass(frozen=True)
class Centring:
    """What takes the classes' unknown normalisers away, one `Affine` a level.

    Fitted to held-out images, and as good as they are like those to be classified.
    """

    levels: tuple[Affine, ...]
    images: int  # that it was fitted to
    labelled: bool  # whether by their labels

    @classmethod
    def fit(cls, scores: Floats, labels: Integers | None, kind: str) -> Centring:
        """For scores (N, levels, K) of held-out images and their labels (N,), by `ExactBayesConfig.centre`.

        kind `labels`: `UserError` without labels. The images must not be those to be classified.
        """
        images, levels, _ = scores.shape
        if kind == "none":
            return cls((Affine(1.0),) * levels, 0, False)
        if not images:
            raise UserError(f"centre = {kind} needs held-out images; there are none: use centre = none")
        if kind == "mean":
            means = scores.mean(0)
            centred = means - means.mean(1, keepdims=True)
            return cls(tuple(Affine(1.0, tuple(b.tolist())) for b in centred), images, False)
        if labels is None:
            raise UserError("centre = labels needs labelled held-out images: use centre = mean, or none")
        return cls(tuple(fit_offsets(scores[:, i], labels) for i in range(levels)), images, True)

    def __call__(self, scores: Floats) -> Floats:
        """log p(y | x), normalised, (N, K): the mean over levels of scores (N, levels, K) centred."""
        parts = [level(scores[:, i]) for i, level in enumerate(self.levels)]
        return log_softmax(np.mean(parts, axis=0))
