"""EDM's preconditionings around its networks (Karras, Aittala, Aila, Laine 2022, arXiv 2206.00364, table 1).

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

for x = x0 + sigma n, which is this project's own currency, F being one of the two U-Nets of `edm_unet`. Of
the four preconditionings `vp`, `ve` and `iddpm` are those of networks that were trained before, `edm` that of
the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_plugins_guidance.edm_configs import EDMConfig
from cdm_plugins_guidance.edm_schedules import edm_grid, iddpm_levels, vp_sigma, vp_time
from cdm_plugins_guidance.edm_unet import DhariwalUNet, SongUNet

__all__ = ["EDM", "edm_grid"]


class EDM(nn.Module):
    """One of the two networks under one of the four preconditionings."""

    u: Tensor

    def __init__(self, config: EDMConfig, info: DataInfo) -> None:
        super().__init__()
        if config.conditional and not info.num_classes:
            raise UserError(f"model.conditional needs labels, and the data set {info.name!r} has none")
        _check_size(config, info)
        self.config = config
        self.num_classes = info.num_classes if config.conditional else None
        channels = info.shape[0]
        # A network of iDDPM has learnt variances too, which EDM has no use for.
        outputs = 2 * channels if config.precond == "iddpm" else channels
        net = SongUNet if config.model_type == "SongUNet" else DhariwalUNet
        self.model = net(config, info.shape, outputs, self.num_classes or 0)
        if config.precond == "iddpm":
            levels = iddpm_levels(config.M, config.C_1, config.C_2)
            self.register_buffer("u", levels.float())
        self.to(memory_format=torch.channels_last)  # the weights too: they are reordered at every call

    # -- noise levels ----------------------------------------------------------------------------------------

    @property
    def null_label(self) -> int | None:
        """The label that means "no class"; None for a model without classes."""
        return self.num_classes

    @property
    def limits(self) -> tuple[float, float]:
        """Least and most noise that the network takes, as published: edm 0 and infinite."""
        config = self.config
        if config.precond == "iddpm":
            return float(self.u[-2]), float(self.u[0])
        if config.precond == "vp":
            times = torch.tensor([config.epsilon_t, 1.0], dtype=torch.float64)
            low, high = vp_sigma(times, config.beta_d, config.beta_min).tolist()
            return low, high
        return config.limits

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise levels that EDM's sampler visits: 0.002 to 80 within what the network takes."""
        low, high = self.limits
        return max(low, 0.002), min(high, 80.0)

    @property
    def sigmas(self) -> Tensor:
        """(M,) float64, ascending: the noise levels of an iDDPM; no such attribute otherwise."""
        if self.config.precond != "iddpm":
            raise AttributeError(f"precond {self.config.precond!r} takes any noise level: it has no sigmas")
        return self.u[:-1].flip(0).to("cpu", torch.float64)

    def scale(self, sigma: Tensor) -> Tensor:
        """1 / sqrt(1 + sigma^2), variance preserving, at the level of an iDDPM nearest to sigma; (B,)."""
        return (1 + self.round_sigma(sigma) ** 2).rsqrt()

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest level above 0 of an iDDPM; sigma itself for the others. (B,) -> (B,), same dtype."""
        if self.config.precond != "iddpm":
            return sigma
        levels = self.u[:-1].to(sigma)
        return levels[_nearest(sigma, levels)]

    # -- denoising -------------------------------------------------------------------------------------------

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x0 | x, sigma, y] (B, C, H, W); sigma (B,) rounded to the levels of an iDDPM.

        y (B,) int64, None or `null_label`: no class, the zero vector. UserError for labels where the model
        has none.
        """
        if self.num_classes is None:
            if y is not None:
                raise UserError("this model is not class-conditional: it takes no labels")
            return self(x, self.round_sigma(sigma))
        labels = None
        if y is not None:
            labels = F.one_hot(y, self.num_classes + 1)[:, :-1].to(x.dtype)
        return self(x, self.round_sigma(sigma), labels)

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """D(x; sigma) (B, C, H, W) for the network's own labels.

        x (B, C, H, W) and sigma (B,) float32, data units; labels (B, num_classes) one-hot or 0, None: 0;
        augment (B, augment_dim) augmentation labels, None: 0. Only c_noise is rounded to levels.
        """
        if labels is None and self.num_classes:
            labels = x.new_zeros(len(x), self.num_classes)
        sigma = sigma.to(x.dtype)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        rows = (-1, 1, 1, 1)
        raw = self.model(c_in.view(rows) * x, c_noise, labels, augment)[:, : x.shape[1]]
        return c_skip.view(rows) * x + c_out.view(rows) * raw.to(x.dtype)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in and c_noise (B,) of noise levels (B,): Karras et al. 2022, table 1."""
        config, one = self.config, torch.ones_like(sigma)
        if config.precond == "edm":
            data, total = config.sigma_data, sigma**2 + config.sigma_data**2
            return data**2 / total, sigma * data / total.sqrt(), total.rsqrt(), sigma.log() / 4
        if config.precond == "ve":
            return one, sigma, one, (sigma / 2).log()
        if config.precond == "vp":
            noise = (config.M - 1) * vp_time(sigma, config.beta_d, config.beta_min)
        else:
            noise = (config.M - 1 - _nearest(sigma, self.u.to(sigma))).to(sigma.dtype)
        return one, -sigma, (1 + sigma**2).rsqrt(), noise


def _nearest(sigma: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of levels (N,), descending; sigma (B,) -> (B,) int64."""
    return (sigma[:, None] - levels).abs().argmin(1)


def _check_size(config: EDMConfig, info: DataInfo) -> None:
    factor = 2 ** (len(config.channel_mult) - 1)
    if info.shape[1] % factor or info.shape[2] % factor:
        raise UserError(
            f"model.channel_mult {config.channel_mult} halves the images {len(config.channel_mult) - 1} "
            f"times, but {factor} does not divide the {info.shape[1]}x{info.shape[2]} of {info.name!r}: give "
            "it fewer entries"
        )
