"""What every network of the library `diffusers` is as a denoiser: a process, a scheduler's, around it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.autoencoder import Latents
from cdm_core.data import DataInfo
from cdm_core.denoisers import DiscreteDenoiser, Predicts
from cdm_core.diffusers_configs import DiffusersConfig
from cdm_core.diffusers_folder import Folder
from cdm_core.errors import UserError

PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def noise_path(config: DiffusersConfig) -> schedules.Path:
    """The levels that a scheduler of DDPM's family noises to, T of them, from clean to noisy, on the CPU."""
    steps, low, high = config.noise_steps, config.beta_start, config.beta_end
    with torch.device("cpu"):
        if config.schedule == "squaredcos_cap_v2":
            cosine = schedules.cosine(steps)
            alpha, sigma = cosine.alpha[1:-1], cosine.sigma[1:-1]
        else:
            ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
            betas = {
                "linear": low + (high - low) * ramp,
                "scaled_linear": (low**0.5 + (high**0.5 - low**0.5) * ramp) ** 2,
                "sigmoid": low + (high - low) * torch.sigmoid(12 * ramp - 6),
                "trained": torch.tensor(config.betas, dtype=torch.float64),
            }[config.schedule]
            log_signal = torch.log1p(-betas).cumsum(0)
            alpha, sigma = (log_signal / 2).exp(), (-torch.expm1(log_signal)).sqrt()
        if config.zero_snr:  # Lin et al. 2024, algorithm 1: the first alpha stays, the last becomes 0
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            sigma = (1 - alpha**2).sqrt()
    return schedules.Path(alpha, sigma)


class Discrete(Latents, DiscreteDenoiser):
    """A network of diffusers on the levels of a scheduler of DDPM's family.

    `net` is the network itself, with the library's own names. Learned variances are the second half of its
    channels (`variance_type` "learned_range").
    """

    def __init__(
        self, net: nn.Module, config: DiffusersConfig, classes: int | None, null: int | None
    ) -> None:
        super().__init__()
        self.net = net
        self.set_process(
            noise_path(config),
            predicts=PREDICTS[config.prediction],
            learned_variance=learns_variance(config.settings),
            num_classes=classes,
            null_label=null,
        )
        self.set_autoencoder(config.autoencoder, config.latent_scale, config.checkpoint_decoder)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's output; x_t (B, C, H, W), t (B,) int64 steps, y (B,) int64 classes or None."""
        return self.net(x_t, t, class_labels=self.spelt_out(y, x_t), return_dict=False)[0]


def checked_settings(config: DiffusersConfig, info: DataInfo) -> dict[str, Any]:
    """The architecture's settings; UserError where there are none, or they are not for data like `info`."""
    if not config.architecture:
        raise UserError("model.architecture is empty: `cdm-run convert` fills it from a folder of diffusers")
    settings = config.settings
    size = settings.get("sample_size")
    shape = (settings.get("in_channels"), *(size if isinstance(size, list) else (size, size)))
    if shape != info.shape:
        wanted, given = ("x".join(map(str, one)) for one in (shape, info.shape))
        raise UserError(f"the network is for {wanted}, and {info.name!r} is {given}")
    return settings


def learns_variance(settings: Mapping[str, Any]) -> bool:
    """Whether a network has twice as many channels out as in."""
    return settings.get("out_channels") == 2 * settings["in_channels"]


# -- as a folder has it --------------------------------------------------------------------------------------


def model_settings(folder: Folder) -> dict[str, Any]:
    """`DiffusersConfig` as a folder has it, as a table of plain values; UserError on an unknown scheduler."""
    found, name = folder.scheduler, str(folder.scheduler.get("_class_name"))
    values: dict[str, Any] = {"architecture": json.dumps(folder.settings, sort_keys=True)}
    if folder.autoencoder is not None:
        values["autoencoder"] = str(folder.autoencoder)
    values["prediction"] = found.get("prediction_type", "epsilon")
    if name.startswith("EDM"):
        values["schedule"] = "edm"
        return values | {key: found[key] for key in ("sigma_data", "sigma_min", "sigma_max") if key in found}
    if "beta_schedule" not in found:
        raise UserError(
            f"{folder.path}: its scheduler {name} is none of DDPM's family (it has no beta_schedule)"
        )
    if found.get("variance_type") == "learned" and learns_variance(folder.settings):
        raise UserError(f"{folder.path}: variance_type 'learned' is not read, only 'learned_range' is")
    values["schedule"] = found["beta_schedule"]
    if found.get("trained_betas") is not None:
        values |= {"schedule": "trained", "betas": found["trained_betas"]}
    values["zero_snr"] = bool(found.get("rescale_betas_zero_snr"))
    values["noise_steps"] = len(values.get("betas", ())) or found.get("num_train_timesteps", 1000)
    return values | {key: found[key] for key in ("beta_start", "beta_end") if key in found}


def data_settings(folder: Folder) -> dict[str, Any]:
    """`DataInfo` of what a folder's network was trained on: latents of its autoencoder, or else pixels."""
    settings = folder.settings
    size = settings.get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    if not all(isinstance(side, int) for side in sides):
        raise UserError(f"{folder.path / 'config.json'} has no sample_size: set it to the size of the images")
    values: dict[str, Any] = {"name": "converted", "shape": [settings["in_channels"], *sides]}
    values |= {"dequantise": False, "class_names": list(folder.class_names)}
    if folder.autoencoder is not None or settings["in_channels"] not in (1, 3):
        values["levels"] = "none"
    for key in ("num_class_embeds", "num_embeds_ada_norm"):  # of U-Nets, of transformers
        if settings.get(key) is not None:
            values["num_classes"] = settings[key]
    return values
