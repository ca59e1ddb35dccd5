"""A classifier of noise levels that denoises and scores (Yadin, Elata, Michaeli 2024, arXiv 2402.10095).

Let F_t(x) be the logits of a classifier that tells at which of the K levels of a path
x_t = alpha_t x0 + sigma_t eps an image is, all levels alike likely, and r the level of pure noise, N(0, I).
With y_t = F_r - F_t,

    Theorem 3.1   E[eps | x_t] = sigma_t (grad y_t(x_t) + x_t)
    Theorem 3.2   log p_t(x_t) = log N(x_t; 0, I) - y_t(x_t)

for every level t, the clean one included: a denoiser by one backward pass, a likelihood by one forward pass.
The logits are the running sums of the outputs o = W h + b of the last layer, so y_t is linear in the
features h, and a table of one vector a level (`cdm_kernels.suffix_table`) replaces the head wherever only y_t
is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_kernels import cumulative_logits, first_order, suffix_table
from cdm_plugins_cdm.configs import ClassifierConfig, MLPConfig

if TYPE_CHECKING:
    from cdm_core.runs import Run


def make_path(config: ClassifierConfig) -> schedules.Path:
    """The path that `config` names, on the CPU whatever the default device."""
    steps = config.noise_steps
    with torch.device("cpu"):
        if config.path == "linear":
            return schedules.linear(steps, config.beta_start, config.beta_end)
        if config.path == "ot_official":
            return schedules.ot_official(steps, config.sigma_min)
        return {"cosine": schedules.cosine, "uniform": schedules.uniform, "ot": schedules.ot}[config.path](
            steps
        )


def count_classes(config: ClassifierConfig, info: DataInfo) -> int | None:
    """Classes that a model is conditioned on, None without; UserError where the data have no labels."""
    if config.conditional and not info.num_classes:
        raise UserError(f"model.conditional needs labels, and the data set {info.name!r} has none")
    return info.num_classes if config.conditional else None


def _rows(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1) in the dtype of `like`."""
    return coefficient.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


class NoiseLevelClassifier(nn.Module):
    """The head and the two theorems; a subclass adds `features`, its trunk.

    Shapes: x (B, C, H, W) in VE units, x = x0 + sigma n, or x_t in the path's own scale; level (B,) int64
    indices of the path's K levels; y (B,) int64 classes, None for no class; features h (B, D).
    """

    def __init__(self, path: schedules.Path, width: int, num_classes: int | None = None) -> None:
        super().__init__()
        if path.reference is None:
            raise UserError("a noise-level classifier needs a path with a level of pure noise")
        self.path = path
        self.reference: int = path.reference
        self.num_classes = num_classes
        # Zero: all levels alike likely. Running sums of a random head would be a random walk over K levels.
        self.linear_layer = nn.Linear(width, len(path))
        nn.init.zeros_(self.linear_layer.weight)
        nn.init.zeros_(self.linear_layer.bias)
        self._fixed_table: tuple[object, tuple[Tensor, Tensor]] | None = None

    def features(self, x_t: Tensor, y: Tensor | None = None) -> Tensor:
        """h (B, D), float32 or better; the logits are linear in it."""
        raise NotImplementedError(f"{type(self).__name__} has no trunk: define `features`")

    # -- what the classifier knows ---------------------------------------------------------------------------

    @property
    def null_label(self) -> int | None:
        """The label that means "no class"; None for a model without classes."""
        return self.num_classes

    @property
    def sigmas(self) -> Tensor:
        """(N,) float64, ascending: the noise levels at which it denoises, VE units."""
        return self.path.ve_sigmas

    def scale(self, sigma: Tensor) -> Tensor:
        """alpha of the level nearest to sigma: x_t = alpha x; (B,) VE units -> (B,)."""
        return self.path.scale(sigma)

    def _classes(self, y: Tensor | None, x: Tensor) -> Tensor | None:
        """y with "no class" spelt out; a model without classes refuses labels."""
        if self.num_classes is None:
            if y is not None:
                raise UserError("this model is not class-conditional: it takes no labels")
            return None
        return torch.full((len(x),), self.num_classes, device=x.device) if y is None else y

    # -- head ------------------------------------------------------------------------------------------------

    def head(self, h: Tensor) -> Tensor:
        """o (B, K) float32 under any autocast: log-ratios of adjacent levels; F are their running sums."""
        with torch.autocast(h.device.type, enabled=False):
            return self.linear_layer(h.to(self.linear_layer.weight.dtype))

    def forward(self, x_t: Tensor, y: Tensor | None = None) -> Tensor:
        """`head` of `features`."""
        return self.head(self.features(x_t, y))

    def table(self) -> tuple[Tensor, Tensor]:
        """y_t = table[t] . h + offset[t]: (K, D) and (K,) float32."""
        return suffix_table(self.linear_layer.weight, self.linear_layer.bias, self.reference)

    def fixed_table(self) -> tuple[Tensor, Tensor]:
        """`table` without its graph, summed once for as long as the head's weights stay what they are.

        A sampling step needs one row of it. Every in-place change of a parameter counts up its version; only
        one made behind autograd's back (`parameter.data.add_`) would go unseen.
        """
        key = tuple((p.data_ptr(), p._version) for p in (self.linear_layer.weight, self.linear_layer.bias))
        if self._fixed_table is None or self._fixed_table[0] != key:
            with torch.no_grad():
                self._fixed_table = key, self.table()
        return self._fixed_table[1]

    def noise_level_logits(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(t | x, y) up to a constant, (B, K) float32; x in the path's own scale."""
        return cumulative_logits(self(x, y))

    # -- Theorem 3.1 -----------------------------------------------------------------------------------------

    def gradient(self, h: Tensor, x_t: Tensor, level: Tensor, create_graph: bool = False) -> Tensor:
        """grad_x y_t (B, C, H, W), h being the features of x_t: a backward pass seeded by the table."""
        table, _ = self.table() if create_graph else self.fixed_table()
        (gradient,) = torch.autograd.grad(h, x_t, table[level].to(h.dtype), create_graph=create_graph)
        return gradient

    def predict_noise(self, h: Tensor, x_t: Tensor, level: Tensor, create_graph: bool = False) -> Tensor:
        """E[eps | x_t] = sigma_t (grad y_t + x_t), (B, C, H, W); h: features of x_t, which requires grad."""
        sigma = self.path.to(level.device).sigma[level]
        return _rows(sigma, x_t) * (self.gradient(h, x_t, level, create_graph) + x_t)

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x0 | x, sigma, y] (B, C, H, W), sigma rounded to the nearest level; differentiable where x is.

        With E[x0 | x_t] = (x_t - sigma_t E[eps | x_t]) / alpha_t and x_t = alpha_t x this is
        (1 - sigma_t^2) x - (sigma_t^2 / alpha_t) grad y_t(x_t): no difference of large numbers at high noise.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("denoise differentiates: call it under torch.no_grad, not inference_mode")
        level = self.path.nearest(sigma)
        create_graph = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad(), nullcontext() if create_graph else first_order():
            x_t = self.path.to_path(x if create_graph else x.detach(), level)
            x_t = x_t if create_graph else x_t.requires_grad_()
            gradient = self.gradient(self.features(x_t, y), x_t, level, create_graph)
        path = self.path.to(x.device)
        alpha, variance = path.alpha[level], path.sigma[level] ** 2
        return _rows(1 - variance, x) * x - _rows(variance / alpha, x) * gradient

    # -- Theorem 3.2 -----------------------------------------------------------------------------------------

    def log_density(self, x: Tensor, y: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        """log p(x | y; sigma) in nats, (B,); sigma (B,) VE units, rounded to the nearest level; None: clean.

        One forward pass. In VE units log p(x) = log p_t(alpha_t x) + d log alpha_t.
        """
        if sigma is None:
            level = torch.full((len(x),), self.path.clean, device=x.device)
        else:
            level = self.path.nearest(sigma)
        x_t = self.path.to_path(x, level)
        h = self.features(x_t, y)
        table, offset = self.table() if torch.is_grad_enabled() else self.fixed_table()
        log_ratio = (table[level] * h).sum(1) + offset[level]
        dim = x[0].numel()
        log_normal = -0.5 * (x_t.flatten(1).square().sum(1) + dim * math.log(2 * math.pi))
        return log_normal - log_ratio + dim * self.path.to(x.device).alpha[level].log().to(x.dtype)

    # -- how far to trust it ---------------------------------------------------------------------------------

    def likelihood_diagnostics(self, x0: Tensor, draws: Draws) -> dict[str, float]:
        """Checks of the density on held-out x0 (B, C, H, W) in model units: `cdm_plugins_cdm.diagnostics`."""
        from cdm_plugins_cdm import diagnostics

        return diagnostics.likelihood_diagnostics(self, x0, draws)

    def report_figures(self, run: Run) -> Iterable[tuple[str, bytes, str]]:
        """(title, PNG, caption) for a run's report: `cdm_plugins_cdm.levels`."""
        from cdm_plugins_cdm import levels

        return levels.figures(levels.analyse(run))


class MLP(NoiseLevelClassifier):
    """A residual perceptron for points of shape (d, 1, 1), smooth so that its gradient can be learnt.

    The features end in the point and its products x_i x_j: a linear read-out of those is a Gaussian at every
    level, and the perceptron learns what differs from it.
    """

    def __init__(self, config: MLPConfig, info: DataInfo) -> None:
        dim, num_classes = info.shape[0], count_classes(config, info)
        if info.shape[1:] != (1, 1):
            raise UserError(
                f"the mlp takes points of shape (d, 1, 1); {info.name!r} has {info.shape}: use the unet"
            )
        super().__init__(make_path(config), config.width + dim + dim * (dim + 1) // 2, num_classes)
        self.first = nn.Linear(dim, config.width)
        with torch.no_grad():
            self.first.weight.mul_(config.gain)
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes + 1, config.width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Linear(config.width, config.width),
                nn.SiLU(),
                nn.Linear(config.width, config.width),
            )
            for _ in range(config.depth)
        )
        self.register_buffer("pairs", torch.triu_indices(dim, dim), persistent=False)
        self.pairs: Tensor

    def features(self, x_t: Tensor, y: Tensor | None = None) -> Tensor:
        """h (B, width + d + d (d + 1) / 2) of points x_t (B, d, 1, 1)."""
        point, classes = x_t.flatten(1), self._classes(y, x_t)
        h = self.first(point)
        if self.label_emb is not None:
            h = h + self.label_emb(classes)
        for block in self.blocks:
            h = h + block(h)
        return torch.cat(
            [F.silu(h).to(point.dtype), point, point[:, self.pairs[0]] * point[:, self.pairs[1]]], 1
        )
