"""ADM (Dhariwal & Nichol 2021, arXiv 2105.05233): a U-Net that denoises, a classifier that guides it.

The networks are `cdm_core.backbones.adm`; here they meet the rest. Both are given x_t on the levels of a
variance-preserving path and the raw t in 0 .. T - 1. The classifier's gradient moves the mean of an ancestral
step by w s grad log p(y | x_t) (their algorithm 1), which any guide makes of `class_logits`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_core import schedules
from cdm_core.backbones.adm import EncoderUNet, UNet, check_image_size
from cdm_core.data import DataInfo
from cdm_core.denoisers import DiscreteDenoiser, DiscreteLevels, respaced
from cdm_core.errors import UserError
from cdm_plugins_guidance.adm_configs import ClassifierConfig, ProcessConfig, UNetConfig


def make_path(config: ProcessConfig) -> schedules.Path:
    """The path that `config` names, on the CPU whatever the default device."""
    steps = config.diffusion_steps
    with torch.device("cpu"):
        if config.noise_schedule == "cosine":
            return schedules.cosine(steps)
        scale = 1000 / steps
        return schedules.linear(steps, scale * config.beta_start, scale * config.beta_end)


class ADM(DiscreteDenoiser, UNet):
    """The U-Net as a denoiser, for the images of `info`."""

    def __init__(self, config: UNetConfig, info: DataInfo) -> None:
        check_image_size(config, info)
        if config.class_cond and not info.num_classes:
            raise UserError(f"model.class_cond needs labels, and the data set {info.name!r} has none")
        classes = info.num_classes if config.class_cond else None
        channels = info.shape[0]
        rows = None if classes is None else classes + config.null_class
        super().__init__(config, channels, (1 + config.learn_sigma) * channels, rows)
        self.set_process(
            make_path(config),
            predicts=config.predicts,
            learned_variance=config.learn_sigma,
            num_classes=classes,
            null_label=classes if config.null_class else None,
            timesteps=respaced(config.diffusion_steps, config.timestep_respacing),
        )


class NoisyClassifier(DiscreteLevels, EncoderUNet):
    """The encoder as a classifier of noisy images, for the images and classes of `info`."""

    def __init__(self, config: ClassifierConfig, info: DataInfo) -> None:
        check_image_size(config, info)
        if not info.num_classes:
            raise UserError(f"a classifier needs classes, and the data set {info.name!r} has no labels")
        if info.shape[1] != info.shape[2]:
            raise UserError(f"a classifier takes square images, not {info.shape[1]}x{info.shape[2]}")
        super().__init__(config, info.shape[0], info.num_classes, info.shape[1], config.pool)
        self.set_levels(make_path(config))
        self.num_classes = info.num_classes

    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Unnormalised log p(y | x), (B, num_classes) float32; x (B, C, H, W) and sigma (B,) in VE units.

        sigma is rounded to the nearest level, 0 to the cleanest. Differentiable in x.
        """
        t = self.nearest(sigma)
        logits = self(self.path.to_path(x, t), t)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
