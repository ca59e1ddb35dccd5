"""Adapters: wrappers that turn one capability of a model into another; all else stays the model's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cdm_core.adapter_configs import BayesConfig, CFGConfig
from cdm_core.capabilities import offered
from cdm_core.errors import UserError
from cdm_core.samplers import Prediction, predicted

PREDICTS = ("predict", "predict_step", "begin_step")  # `cdm_core.samplers.Conditional`


class Wrapper:
    """Passes every attribute that it lacks (`sigmas`, `scale`, `parameters`, ...) through to the model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        # `model` is not set yet when copying and unpickling ask, before `__init__`. What predicts is never
        # passed through: a wrapper that changes `denoise` alone would be gone round.
        if name in ("model", *PREDICTS):
            raise AttributeError(name)
        return getattr(self.model, name)


class ClassifierFreeGuidance(Wrapper):
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): D = (1 + w) D(x, y) - w D(x).

    A model with an attribute `null_label: int` (the label that means "no class") gets one doubled batch, any
    other two calls. One with an attribute `cfg_channels: int` is guided in that many channels; the others
    stay conditional (Peebles & Xie 2023), as does a learned variance. Densities are not offered: the model
    knows none of the guided process.
    """

    def __init__(self, config: CFGConfig, model: Any) -> None:
        super().__init__(model)
        self.capabilities = offered(model) & {"denoise", "class_logits", "to_images"}
        self.weight = config.weight

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """Guided E[x0 | x, sigma, y]; x (B, C, H, W), sigma (B,), y (B,) int64, None: no class."""
        return self.predict(x, sigma, y).x0

    def predict(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Prediction:
        """As `denoise`, with the model's learned variance where it has one."""
        if y is None or self.weight == 0:
            return predicted(self.model, x, sigma, y)
        null = getattr(self.model, "null_label", None)
        if null is None:
            conditional, variance = predicted(self.model, x, sigma, y)
            plain = self.model.denoise(x, sigma, None)
        else:
            labels = torch.cat([y, torch.full_like(y, null)])
            both, variance = predicted(self.model, torch.cat([x, x]), torch.cat([sigma, sigma]), labels)
            conditional, plain = both.chunk(2)
            variance = None if variance is None else variance.chunk(2)[0]
        guided = (1 + self.weight) * conditional - self.weight * plain
        first = getattr(self.model, "cfg_channels", None)
        if first is not None:
            guided = torch.cat([guided[:, :first], conditional[:, first:]], dim=1)
        return Prediction(guided, variance)


class Clipped(Wrapper):
    """Predictions clamped to [-1, 1], where the data lie and with them E[x0 | x] (`clip_denoised`)."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.capabilities = offered(model)

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """The model's E[x0 | x, sigma, y], clamped."""
        return self.model.denoise(x, sigma, y).clamp(-1, 1)

    def predict(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Prediction:
        """As `denoise`, with the model's learned variance where it has one."""
        x0, variance = predicted(self.model, x, sigma, y)
        return Prediction(x0.clamp(-1, 1), variance)


class BayesClassifier(Wrapper):
    """Bayes' rule on a class-conditional density: log p(y | x) = log p(x | y) + log p(y) + const.

    One pass of the model a class. The model says how many classes it has by its attribute `num_classes: int`.
    """

    def __init__(self, config: BayesConfig, model: Any) -> None:
        super().__init__(model)
        self.capabilities = offered(model) | {"class_logits"}
        classes: int | None = getattr(model, "num_classes", None)
        if not classes:
            raise UserError("the Bayes classifier needs a class-conditional model; this one has no labels")
        prior = config.prior or (1.0,) * classes
        if len(prior) != classes:
            raise UserError(
                f"the Bayes classifier's prior has {len(prior)} entries, the model {classes} classes"
            )
        self.log_prior = [math.log(p / sum(prior)) for p in prior]

    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p(x, y; sigma) of every class y, nats, (B, num_classes); x (B, C, H, W), sigma (B,)."""
        columns = []
        for label, log_prior in enumerate(self.log_prior):
            y = torch.full((len(x),), label, dtype=torch.long, device=x.device)
            columns.append(self._log_density(x, y, sigma) + log_prior)
        return torch.stack(columns, dim=1)

    def _log_density(self, x: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """log p(x | y; sigma), rows with sigma = 0 as clean data, which models know by sigma=None."""
        clean = sigma == 0
        if clean.all():
            return self.model.log_density(x, y)
        if not clean.any():
            return self.model.log_density(x, y, sigma)
        noisy = self._log_density(x[~clean], y[~clean], sigma[~clean])
        result = noisy.new_empty(len(x))
        result[~clean], result[clean] = noisy, self.model.log_density(x[clean], y[clean])
        return result
