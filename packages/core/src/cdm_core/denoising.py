"""What a network on discrete levels is trained with: squared error, and the likelihood bound of its steps.

At a uniform t, L_simple = |target - prediction|^2 (Ho et al. 2020, eq. 14). The bound (their eq. 5) has at
t > 0 the divergence of the posterior q(x_{t-1} | x_t, x0) from the model's step, in variance-exploding units

    KL = 1/2 [log(w / v) - 1 + v / w + (1 - r)^2 (x0 - x0^)^2 / w],    r = (sigma_{t-1} / sigma_t)^2

with v the posterior's variance and w the model's, and at t = 0 the probability of the grey level under
N(x0^, w). Where the network has learned w the two are added, the mean held fixed in the bound, so that the
bound trains the variance alone (Nichol & Dhariwal 2021, eq. 16).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdm_core.denoisers import DiscreteDenoiser, Output
from cdm_core.denoising_configs import DenoisingConfig
from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_core.schedules import Path


class Moments(NamedTuple):
    """The ancestral step from every t to t - 1, (T,) float64: how much of x0 its mean takes, log variances.

    small, large: as `cdm_core.samplers.Step`, but at t = 0, where the step has no variance, small is that of
    t = 1 in the scale of the variance-preserving path (the official `clipped`).
    """

    share: Tensor
    small: Tensor
    large: Tensor


def moments(path: Path) -> Moments:
    """Of the steps between neighbouring levels of `path`, ascending in noise, in VE units."""
    after = path.ve_sigma.square()  # variance at t
    before = torch.cat([after.new_zeros(1), after[:-1]])
    share = 1 - before / after
    small = (before * share)[1:]
    clipped = small[:1] / (1 + after[:1]) if len(small) else share * after
    large = (1 + before) * (after - before) / (1 + after)
    return Moments(share, torch.cat([clipped, small]).log(), large.log())


def log_grey_level(x0: Tensor, mean: Tensor, log_std: Tensor, levels: int = 256) -> Tensor:
    """log of N(mean, std)'s mass in the cell of each grey level x0 in [-1, 1], in nats; all of one shape.

    The outermost cells reach to infinity; the normal distribution function is GELU's approximation of it.
    """
    half, centred, precision = 1 / (levels - 1), x0 - mean, (-log_std).exp()
    above, below = _normal_cdf(precision * (centred + half)), _normal_cdf(precision * (centred - half))
    inside = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """1/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Page 1977), as the official bounds have it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def drop_labels(model: Any, y: Tensor | None, draws: Draws, share: float) -> Tensor | None:
    """The classes to train `model` with: None where it knows none, else y (B,), `share` of it replaced.

    A label is replaced by `model.null_label`, where there is one and in training only: `draws` gives the
    coin. UserError where a class-conditional model gets no labels.
    """
    if model.num_classes is None:
        return None
    if y is None:
        raise UserError("a class-conditional model is trained on labelled data, and these have no labels")
    if model.null_label is None or not model.training:
        return y
    return torch.where(draws.uniform() < share, model.null_label, y)


class DenoisingObjective:
    """`objective(model, x0, y, draws) -> {"loss"[, "mse"][, "vlb"]}`, scalars; `vlb` in bits per dimension.

    In order, `draws` gives the levels, the noise and, where the model has a label for "no class", the coin
    that drops labels. `vlb` is T times the bound's term at t: its mean is the bound but for the prior's term.
    """

    def __init__(self, config: DenoisingConfig) -> None:
        self.config = config

    def __call__(self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws) -> dict[str, Tensor]:
        """x0 (B, C, H, W) float32 in model units; y (B,) int64 or None, unused by a model without classes."""
        return self.loss(model, *self.prepare(model, x0, y, draws))

    def prepare(
        self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Everything random: x0 and x_t (B, C, H, W), t (B,), the noise, classes (B,) or None."""
        if not isinstance(model, DiscreteDenoiser):
            raise UserError(
                "the objective core/denoising trains networks on discrete levels, "
                f"not a {type(model).__name__}"
            )
        t = draws.integers(len(model.path))
        eps = draws.normal(*x0.shape[1:]).to(x0.dtype)
        classes = drop_labels(model, y, draws, self.config.label_dropout)
        return x0, model.path.noised(x0, t, eps), t, eps, classes

    def loss(
        self, model: DiscreteDenoiser, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, classes: Tensor | None
    ) -> dict[str, Tensor]:
        """The losses of what `prepare` returned; tensor operations only."""
        out = model.output(x_t, t, classes)
        scalars: dict[str, Tensor] = {}
        if self.config.loss == "mse":
            error = (model.target(x0, eps, t) - out.value).square().flatten(1).mean(1)
            loss = (self.weights(model, t).to(error.dtype) * error).mean()
            scalars["mse"] = error.detach().mean()
            if out.variance is None:
                return {"loss": loss, **scalars}
            vlb = self.bound(model, Output(out.value.detach(), out.variance), x0, x_t, t)
            loss = loss + self.config.vlb_weight * len(model.path) * vlb.mean()
        else:
            vlb = self.bound(model, out, x0, x_t, t)
            loss = len(model.path) * vlb.mean()
        return {"loss": loss, **scalars, "vlb": len(model.path) * vlb.detach().mean()}

    def weights(self, model: DiscreteDenoiser, t: Tensor) -> Tensor:
        """Weight of the squared error at each t, (B,) float64.

        Published as weights of the error of x0, min(SNR, gamma) and SNR / (k + SNR)^gamma; the error of eps
        is SNR times that of x0, the error of v (1 + SNR) times.
        """
        snr = model.path.to(t.device).log_snr[t].exp()
        if self.config.weight == "none":
            return torch.ones_like(snr)
        if self.config.weight == "min-snr":
            of_x0 = snr.clamp(max=self.config.min_snr_gamma)
        else:
            of_x0 = snr / (self.config.p2_k + snr) ** self.config.p2_gamma
        return of_x0 / {"x0": torch.ones_like(snr), "eps": snr, "v": 1 + snr}[model.predicts]

    def bound(self, model: DiscreteDenoiser, out: Output, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term at t of each image, (B,), bits per dimension."""
        path = model.path.to(t.device)
        share, small, large = (row[t].to(x0.dtype).view(-1, 1, 1, 1) for row in moments(path))
        guess = model.to_x0(out.value, x_t, t)
        if out.variance is None:
            log_w = large if self.config.fixed_variance == "large" else small
            log_w = torch.where((t == 0).view(-1, 1, 1, 1), small, log_w)
        else:
            log_w = out.variance * large + (1 - out.variance) * small
        squared = (share * (x0 - guess)).square()
        divergence = 0.5 * (log_w - small - 1 + (small - log_w).exp() + squared * (-log_w).exp())
        last = -log_grey_level(x0, guess, 0.5 * log_w.expand_as(x0), self.config.grey_levels)
        term = torch.where((t == 0).view(-1, 1, 1, 1), last, divergence)
        return term.flatten(1).mean(1) / math.log(2)
