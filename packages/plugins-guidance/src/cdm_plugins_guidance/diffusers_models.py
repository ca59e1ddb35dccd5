"""Networks of the library `diffusers` as denoisers: `UNet2DModel` and `DiTTransformer2DModel`.

A folder of the library says what the network is, and its scheduler's settings what noise it was trained on;
`read_folder` turns both into settings of a model here, so that such a network is converted, sampled, guided
and scored like any other. Where the library computes something else than the networks whose weights it holds,
it is put right (`official`, `num_heads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from cdm_core.autoencoder import Latents
from cdm_core.data import DataInfo
from cdm_core.diffusers_configs import DiffusersConfig
from cdm_core.diffusers_folder import Folder, build, find
from cdm_core.diffusers_models import Discrete, checked_settings, data_settings, model_settings
from cdm_core.errors import UserError
from cdm_core.formats import Foreign, filled, overridden
from cdm_core.settings import Selection
from cdm_plugins_guidance.diffusers_configs import Transformer2DConfig, UNet2DConfig

UNET2D = "UNet2DModel"
TRANSFORMERS = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in old folders, and not DiT alone


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
        settings = checked_settings(config, info)
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
    settings = checked_settings(config, info)
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


def _check_classes(classes: int | None, info: DataInfo) -> None:
    if classes is not None and classes != info.num_classes:
        raise UserError(f"the network knows {classes} classes, {info.name!r} has {info.num_classes}")


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


def note(folder: Folder) -> str:
    """How the folder's scheduler samples, where that is not how it is sampled here unless told."""
    scheduler = folder.scheduler
    parts = [f"Its scheduler is {scheduler.get('_class_name')}."]
    if scheduler.get("clip_sample"):
        parts.append("It clips every prediction to [-1, 1]: sample with sample.clip=true to do the same.")
    if str(scheduler.get("variance_type")).startswith("fixed_large"):
        parts.append("Its ancestral steps have the large variance: sampler.variance=large.")
    return " ".join(parts)
