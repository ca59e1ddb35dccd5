"""A class-conditional denoiser as a classifier: the capability `class_logits` out of `denoise`.

Of clean images the logits are a race's scores (Li et al. 2023, arXiv 2303.16203). An image x at a level s is
to the levels t > s what a clean one is to all: x_t = x + tau n, tau^2 = t^2 - s^2, and by Tweedie's formula

    E[x | x_t, y] = x_t + tau^2 / t^2 (D(x_t, t, y) - x_t),

a denoiser of noisy images, whose bound is one of log p(x; s | y).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cdm_core.adapters import Wrapper
from cdm_core.capabilities import offered
from cdm_core.errors import UserError
from cdm_core.samplers import Prediction, predicted
from cdm_plugins_zeroshot.race import Race
from cdm_plugins_zeroshot.zeroshot_configs import ClassifierConfig


class AtLevel(Wrapper):
    """A denoiser of images that are at level s > 0 already, VE units; its levels are tau."""

    sigma_clean = 0.0

    def __init__(self, model: Any, level: float) -> None:
        super().__init__(model)
        self.level = level
        own: Tensor | None = getattr(model, "sigmas", None)
        if own is not None:
            above = own[
                own > level * (1 + 1e-6)
            ]  # float32 may have rounded s away from the model's own level
            if len(above) < 2:
                raise UserError(
                    f"noise of {level:g} leaves a denoiser that ends at {float(own[-1]):g} no levels"
                )
            self.sigmas = (above.square() - level**2).sqrt()

    def denoise(self, x: Tensor, tau: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x_s | x, y]; x (B, C, H, W), tau (B,) the noise that it has more than s."""
        sigma = (tau.square() + self.level**2).sqrt()
        share = (tau / sigma).square()[:, None, None, None]
        return x + share * (self.model.denoise(x, sigma, y) - x)


class DiffusionClassifier(Wrapper):
    """`class_logits` from `denoise` with labels; everything else is the model's own.

    What is random is keyed by the pixels of an image: logits depend on no batch.
    """

    def __init__(self, config: ClassifierConfig, model: Any) -> None:
        super().__init__(model)
        self.capabilities = offered(model) | {"class_logits"}
        self.config = config
        if not getattr(model, "num_classes", None):
            raise UserError("a diffusion classifier needs a class-conditional model; this one has no labels")

    def predict(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Prediction:
        """The model's own, with its learned variance where it has one: what is sampled stays as it was."""
        return predicted(self.model, x, sigma, y)

    @torch.no_grad()
    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Scores of a race over `temperature`, (B, K) float32; x (B, C, H, W), sigma (B,) >= 0, VE units."""
        logits = x.new_empty(len(x), self.model.num_classes, dtype=torch.float32)
        keys = [_key(row) for row in x.cpu()]
        with _evaluating(self.model):
            for level in sigma.unique().tolist():
                same: dict[int, list[int]] = {}
                for row in (sigma == level).nonzero()[:, 0].tolist():
                    same.setdefault(keys[row], []).append(row)
                for verdict in self._race(level, x)((key, x[rows[0]]) for key, rows in same.items()):
                    scores = torch.tensor(verdict.scores, dtype=torch.float32, device=x.device)
                    logits[same[verdict.image]] = scores / self.config.temperature
        return logits

    def _race(self, level: float, x: Tensor) -> Race:
        model = AtLevel(self.model, level) if level else self.model
        return Race(model, self.config.estimator, self.config.elimination, tuple(x.shape[1:]))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode for a while: a classifier drops no labels."""
    training = bool(getattr(model, "training", False))
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _key(image: Tensor) -> int:
    content = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8)
    return int.from_bytes(content.digest(), "little")
