"""Networks of the library `diffusers` as denoisers: `UNet2DModel` and `DiTTransformer2DModel`.

A folder of the library says what the network is, and its scheduler's settings what noise it was trained on;
`read_folder` turns both into settings of a model here, so that such a network is converted, sampled, guided
and scored like any other. Where the library computes something else than the networks whose weights it holds,
it is put right (`official`, `num_heads`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.data import DataInfo
from cdm_core.denoisers import DiscreteDenoiser, Predicts
from cdm_core.errors import UserError
from cdm_core.formats import Foreign, filled, overridden
from cdm_core.settings import Selection
from cdm_plugins_guidance.autoencoder import Latents
from cdm_plugins_guidance.diffusers_configs import DiffusersConfig, Transformer2DConfig, UNet2DConfig
from cdm_plugins_guidance.diffusers_folder import Folder, build, find

UNET2D = "UNet2DModel"
TRANSFORMERS = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in old folders, and not DiT alone
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
            learned_variance=_learns_variance(config.settings),
            num_classes=classes,
            null_label=null,
        )
        self.set_autoencoder(config.autoencoder, config.latent_scale, config.checkpoint_decoder)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's output; x_t (B, C, H, W), t (B,) int64 steps, y (B,) int64 classes or None."""
        return self.net(x_t, t, class_labels=self.spelt_out(y, x_t), return_dict=False)[0]


class Preconditioned(Latents):
    """A network of diffusers for any noise level (Karras et al. 2022, eq. 7): with d = sigma_data,

    D(x; sigma) = c_skip x + c_out F(c_in x, log(sigma) / 4), c_in = 1 / sqrt(sigma^2 + d^2),
    c_skip = d^2 c_in^2, c_out = sigma d c_in; of opposite sign where F predicts v.
    """

    null_label = None  # the library has no class that means "none"

    def __init__(self, net: nn.Module, config: DiffusersConfig, classes: int | None) -> None:
        super().__init__()
        self.net = net
        self.num_classes = classes
        self.sigma_range = (config.sigma_min, config.sigma_max)
        self.sigma_data = config.sigma_data
        self.sign = -1.0 if config.prediction == "v_prediction" else 1.0
        self.set_autoencoder(config.autoencoder, config.latent_scale, config.checkpoint_decoder)

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x0 | x, sigma, y] (B, C, H, W); x in VE units, sigma (B,), y (B,) int64 or None."""
        if (y is None) != (self.num_classes is None):
            raise UserError(f"this model {'needs' if y is None else 'takes no'} labels")
        s, d = sigma.view(-1, 1, 1, 1), self.sigma_data
        c_in = (s**2 + d**2).rsqrt()
        out = self.net(c_in * x, sigma.log() / 4, class_labels=y, return_dict=False)[0]
        return d**2 * c_in**2 * x + self.sign * s * d * c_in * out.to(x.dtype)


class Transformer2D(Discrete):
    """A `DiTTransformer2DModel`; UserError where it is not for data like `info`.

    cfg_channels: how many channels classifier-free guidance moves, the first ones; None: all.
    """

    def __init__(self, config: Transformer2DConfig, info: DataInfo) -> None:
        settings = _settings(config, info)
        net = build(TRANSFORMERS[0], settings, "model.architecture")
        for block in net.transformer_blocks:
            embedding = block.norm1.emb
            embedding.class_embedder.dropout_prob = 0.0  # labels are dropped by the objective
            if config.official:
                embedding.time_proj.downscale_freq_shift = 0
                block.norm3.eps = 1e-6
        classes: int = settings.get("num_embeds_ada_norm", 1000)
        _check_classes(classes, info)
        super().__init__(net, config, classes, classes)
        self.cfg_channels = config.cfg_channels


def UNet2D(config: UNet2DConfig, info: DataInfo) -> Discrete | Preconditioned:
    """The model of a `UNet2DModel`; UserError where it is not for data like `info`."""
    settings = _settings(config, info)
    if settings.get("class_embed_type") is not None:
        raise UserError("model.architecture: class_embed_type must be null: classes are numbers here")
    net = build(UNET2D, settings, "model.architecture")
    if config.num_heads is not None:
        set_heads(net, config.num_heads)
    classes: int | None = settings.get("num_class_embeds")
    _check_classes(classes, info)
    if config.schedule == "edm":
        return Preconditioned(net, config, classes)
    return Discrete(net, config, classes, None)


def set_heads(net: nn.Module, heads: int) -> None:
    """Give every attention of a network of diffusers that many heads."""
    for module in net.modules():
        if hasattr(module, "to_q") and hasattr(module, "heads"):
            width = cast(nn.Linear, module.to_q).out_features
            if width % heads:
                raise UserError(f"model.num_heads {heads} does not divide the {width} of an attention")
            module.__dict__.update(heads=heads, scale=(width // heads) ** -0.5)


def _settings(config: DiffusersConfig, info: DataInfo) -> dict[str, Any]:
    if not config.architecture:
        raise UserError("model.architecture is empty: `cdm-run convert` fills it from a folder of diffusers")
    settings = config.settings
    size = settings.get("sample_size")
    shape = (settings.get("in_channels"), *(size if isinstance(size, list) else (size, size)))
    if shape != info.shape:
        wanted, given = ("x".join(map(str, one)) for one in (shape, info.shape))
        raise UserError(f"the network is for {wanted}, and {info.name!r} is {given}")
    return settings


def _check_classes(classes: int | None, info: DataInfo) -> None:
    if classes is not None and classes != info.num_classes:
        raise UserError(f"the network knows {classes} classes, {info.name!r} has {info.num_classes}")


def _learns_variance(settings: Mapping[str, Any]) -> bool:
    return settings.get("out_channels") == 2 * settings["in_channels"]


# -- folders -------------------------------------------------------------------------------------------------


def read_folder(path: Path, overrides: Sequence[str] = ()) -> Foreign | None:
    """The network in a folder of diffusers (`find` says how it is named); None where there is none.

    UserError on a scheduler that is not understood, and on damaged files.
    """
    folder = find(path, (UNET2D, *TRANSFORMERS))
    if folder is None:
        return None
    transformer = folder.kind != UNET2D
    if transformer and folder.settings.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        return None  # a Transformer2DModel that is no DiT
    cls = Transformer2DConfig if transformer else UNet2DConfig
    name = "guidance/diffusers-dit" if transformer else "guidance/diffusers-unet2d"
    values = overridden({"model": model_settings(folder), "data": data_settings(folder)}, overrides)
    config = filled(cls, values["model"], "model", "--set")
    info = filled(DataInfo, values["data"], "data", "--set")
    state = {f"net.{key}": tensor for key, tensor in folder.weights().items()}
    return Foreign(state, Selection(name, config), info, note(folder))


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
    if found.get("variance_type") == "learned" and _learns_variance(folder.settings):
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
    key = "num_class_embeds" if folder.kind == UNET2D else "num_embeds_ada_norm"
    if settings.get(key) is not None:
        values["num_classes"] = settings[key]
    return values


def note(folder: Folder) -> str:
    """How the folder's scheduler samples, where that is not how it is sampled here unless told."""
    scheduler = folder.scheduler
    parts = [f"Its scheduler is {scheduler.get('_class_name')}."]
    if scheduler.get("clip_sample"):
        parts.append("It clips every prediction to [-1, 1]: sample with sample.clip=true to do the same.")
    if str(scheduler.get("variance_type")).startswith("fixed_large"):
        parts.append("Its ancestral steps have the large variance: sampler.variance=large.")
    return " ".join(parts)
