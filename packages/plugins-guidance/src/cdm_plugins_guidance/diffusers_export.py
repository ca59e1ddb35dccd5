"""`cdm-run guidance to-diffusers`: a converted DiT, ADM or EDM-ADM as a folder of the library `diffusers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from safetensors.torch import save
from torch import Tensor

from cdm_core import formats
from cdm_core.commands.common import Session
from cdm_core.data import DataInfo
from cdm_core.diffusers_folder import WEIGHTS
from cdm_core.errors import UserError
from cdm_core.files import to_json, write_bytes
from cdm_plugins_guidance.adm_configs import UNetConfig
from cdm_plugins_guidance.diffusers_weights import adm_to_diffusers, dit_to_diffusers, edm_to_diffusers
from cdm_plugins_guidance.dit_configs import DiTConfig
from cdm_plugins_guidance.edm_configs import EDMConfig

State = Mapping[str, Tensor]
# Settings and weights of the library's network, and of its scheduler.
Exported = tuple[dict[str, Any], State, dict[str, Any]]

DIT_WARNING = (
    "diffusers does not compute with these weights what DiT does (its time frequencies and one epsilon are "
    "others) unless time_proj.downscale_freq_shift is set to 0 and norm3.eps to 1e-6 in every block."
)


def _ddpm(steps: int, learned: bool, **settings: Any) -> dict[str, Any]:
    variance = "learned_range" if learned else "fixed_small"
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        "variance_type": variance,
        "clip_sample": False,
        **settings,
    }


def _dit(config: DiTConfig, info: DataInfo, state: State) -> Exported:
    settings, weights = dit_to_diffusers(state, config)
    settings = {"_class_name": "DiTTransformer2DModel", "norm_eps": 1e-6, **settings}
    betas = {"beta_schedule": "linear", "beta_start": config.beta_start, "beta_end": config.beta_end}
    return settings, weights, _ddpm(config.noise_steps, config.learn_sigma, **betas)


def _adm(config: UNetConfig, info: DataInfo, state: State) -> Exported:
    if info.shape[1] != info.shape[2] or config.num_heads_upsample not in (-1, config.num_heads):
        raise UserError("UNet2DModel is square here, and has as many heads on the way up as on the way down")
    if not (config.resblock_updown or config.conv_resample):
        raise UserError("UNet2DModel resamples with a convolution or a block, not without weights")
    by_number = config.num_head_channels == -1
    attended = {w for i, w in enumerate(config.widths) if 2**i in config.attention_resolutions}
    if by_number and len(attended | {config.widths[-1]}) > 1:
        raise UserError(
            f"UNet2DModel cannot say in its config.json that attention has {config.num_heads} heads at "
            "several widths: it knows a width a head"
        )
    settings, weights = adm_to_diffusers(
        state,
        image_size=info.shape[1],
        layers=config.num_res_blocks,
        num_heads=config.num_heads,
        head_channels=None if by_number else config.num_head_channels,
        legacy=not config.use_new_attention_order,
    )
    scale = 1000 / config.diffusion_steps
    betas: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
    if config.noise_schedule == "linear":
        ends = {"beta_start": scale * config.beta_start, "beta_end": scale * config.beta_end}
        betas = {"beta_schedule": "linear", **ends}
    predicts = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[config.predicts]
    settings = {"_class_name": "UNet2DModel", **settings}
    steps, learned = config.diffusion_steps, config.learn_sigma
    return settings, weights, _ddpm(steps, learned, **betas, prediction_type=predicts)


def _edm(config: EDMConfig, info: DataInfo, state: State) -> Exported:
    if (config.model_type, config.precond) != ("DhariwalUNet", "edm"):
        raise UserError(
            "of EDM's networks, UNet2DModel can be DhariwalUNet with its own preconditioning alone"
        )
    settings, weights = edm_to_diffusers(state, image_size=info.shape[1])
    scheduler = {"_class_name": "EDMEulerScheduler", "sigma_data": config.sigma_data}
    return {"_class_name": "UNet2DModel", **settings}, weights, scheduler


EXPORTS: dict[str, Callable[[Any, DataInfo, State], Exported]] = {
    "guidance/dit": _dit,
    "guidance/adm": _adm,
    "guidance/edm": _edm,
}


def write_folder(exported: Exported, folder: Path) -> None:
    """Write config, weights and scheduler where the library looks for them; UserError where that fails."""
    settings, weights, scheduler = exported
    tensors = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    write_bytes(folder / WEIGHTS[0], save(tensors, {"format": "pt"}))
    write_bytes(folder / "scheduler_config.json", to_json(scheduler).encode())
    write_bytes(folder / "config.json", to_json(settings).encode())


@click.command("to-diffusers")
@click.argument("src", type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="FOLDER", type=click.Path(path_type=Path), help="Made anew.")
@click.pass_obj
def command(session: Session, src: Path, out: Path) -> None:
    """Write the converted model SRC (DiT, ADM or EDM-ADM) as a folder of the library diffusers."""
    if out.exists():
        raise UserError(f"--out {out} exists: choose another name")
    model, about = formats.load_converted(src, session.registry)
    export = EXPORTS.get(about.model.name)
    if export is None:
        raise UserError(f"{src} holds {about.model.name}: diffusers can have {', '.join(EXPORTS)}")
    exported = export(about.model.config, about.info, model.state_dict())
    write_folder(exported, out)
    click.echo(f"{out}: {exported[0]['_class_name']}, {exported[2]['_class_name']}")
    if about.model.name == "guidance/dit":
        click.echo(DIT_WARNING)
