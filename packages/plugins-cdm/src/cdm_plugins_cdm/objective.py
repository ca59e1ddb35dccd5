"""What a classification diffusion model minimises: w_ce * cross-entropy + w_mse * denoising error.

Yadin, Elata, Michaeli 2024, arXiv 2402.10095. The cross-entropy of the noise level pins the ratios of
adjacent levels and with them the likelihood; the error of E[eps | x_t] = sigma_t (grad y_t + x_t),
differentiated twice, shapes the density far from where the cross-entropy looks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_kernels import noise_level_head
from cdm_plugins_cdm.configs import ObjectiveConfig
from cdm_plugins_cdm.model import NoiseLevelClassifier


class Terms(NamedTuple):
    """Per image, (B,) float32: -log p(t | x_t) in nats, squared error of eps a pixel, and argmax = t."""

    cross_entropy: Tensor
    squared_error: Tensor | None
    hit: Tensor


def terms(
    model: NoiseLevelClassifier,
    x_t: Tensor,
    level: Tensor,
    eps: Tensor,
    y: Tensor | None,
    denoising: bool = True,
) -> Terms:
    """Both losses at x_t = alpha_t x0 + sigma_t eps; x_t, eps (B, C, H, W), level and y (B,) int64.

    Differentiable in the parameters where grad is enabled; the error of eps comes by differentiation in x_t,
    so its own gradient is of second order. `denoising` False: no error, nothing is differentiated.
    """
    return _terms(model, x_t.detach().requires_grad_(denoising), level, eps, y)


def _terms(model: NoiseLevelClassifier, x_t: Tensor, level: Tensor, eps: Tensor, y: Tensor | None) -> Terms:
    """`terms` at a leaf x_t that requires grad where the error is wanted.

    The leaf is the caller's, as a compiler cannot take one that is made inside what it compiles.
    """
    create_graph = torch.is_grad_enabled()
    squared_error = None
    with torch.enable_grad():
        h = model.features(x_t, y)
        if x_t.requires_grad:
            error = model.predict_noise(h, x_t, level, create_graph) - eps
            squared_error = error.square().flatten(1).mean(1)
    o = model.head(h if create_graph else h.detach())
    head = noise_level_head(o, level, model.reference)
    return Terms(head.cross_entropy, squared_error, (head.estimate == level).float())


class CDMObjective:
    """`objective(model, x0, y, draws) -> {"loss", "ce", "mse", "accuracy"}`, scalars.

    Noise levels are uniform over all K. In order, `draws` gives the levels, the noise and, for a conditional
    model, the coin that drops labels; labels are dropped in training only, never where a model is validated.
    `loss` is the official one: its error is a mean over the whole batch, with the levels where the predicted
    noise is the same whatever the net (0 when clean, x_t itself at pure noise). `mse` is over the other
    levels: the sum over those, divided by how many of the batch are expected there; absent where w_mse is 0.

    It is split, `loss` of what `prepare` drew, so that `loss` can be compiled (`cdm_core.compiled`).
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def __call__(self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws) -> dict[str, Tensor]:
        """x0 (B, C, H, W) float32 in model units; y (B,) int64 or None, unused by a model without classes."""
        return self.loss(model, *self.prepare(model, x0, y, draws))

    def prepare(
        self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Everything random: x_t (B, C, H, W), a leaf; its levels (B,); its noise; classes (B,) or None."""
        if not isinstance(model, NoiseLevelClassifier):
            raise UserError(
                f"the objective cdm/cdm trains noise-level classifiers, not a {type(model).__name__}"
            )
        level = draws.integers(len(model.path))
        eps = draws.normal(*x0.shape[1:]).to(x0.dtype)
        classes = self._labels(model, y, draws)
        x_t = model.path.noised(x0, level, eps).detach().requires_grad_(self.config.w_mse > 0)
        return x_t, level, eps, classes

    def loss(
        self, model: NoiseLevelClassifier, x_t: Tensor, level: Tensor, eps: Tensor, classes: Tensor | None
    ) -> dict[str, Tensor]:
        """The losses of what `prepare` returned; tensor operations only."""
        parts = _terms(model, x_t, level, eps, classes)
        ce = parts.cross_entropy.mean()
        # A zero weight keeps the head in the graph: in distributed training every parameter needs a gradient.
        loss = self.config.w_ce * ce
        scalars = {"ce": ce.detach(), "accuracy": parts.hit.mean()}
        if parts.squared_error is not None:
            loss = loss + self.config.w_mse * parts.squared_error.mean()
            scalars["mse"] = _where_learnt(model, parts.squared_error.detach(), level)
        return {"loss": loss, **scalars}

    def _labels(self, model: NoiseLevelClassifier, y: Tensor | None, draws: Draws) -> Tensor | None:
        if model.null_label is None:
            return None
        if y is None:
            raise UserError("a class-conditional model is trained on labelled data, and these have no labels")
        if not model.training:
            return y
        return torch.where(draws.uniform() < self.config.label_dropout, model.null_label, y)


def _where_learnt(model: NoiseLevelClassifier, squared_error: Tensor, level: Tensor) -> Tensor:
    """Mean error over the levels where the predicted noise depends on the net, () float32."""
    learnt = model.path.to(level.device).sigma > 0
    learnt[model.reference] = False
    return (squared_error * learnt[level]).mean() / learnt.double().mean().to(squared_error.dtype)
