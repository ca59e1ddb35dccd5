"""What plugin cdm registers: classification diffusion models (Yadin et al. 2024, arXiv 2402.10095)."""

from __future__ import annotations

from collections.abc import Iterable

from cdm_core import hookimpl
from cdm_core.records import CheckpointFormat, Command, Model, Objective, Recipe
from cdm_plugins_cdm.configs import MLPConfig, ObjectiveConfig, UNetConfig
from cdm_plugins_cdm.recipes import RECIPES

_PROVIDES = ("denoise", "log_density", "noise_level_logits")


@hookimpl
def register_models() -> Iterable[Model]:
    unet, mlp = "cdm_plugins_cdm.unet:UNet", "cdm_plugins_cdm.model:MLP"
    return [
        Model("unet", "Noise-level classifier of images, the official U-Net", unet, UNetConfig, _PROVIDES),
        Model("mlp", "Noise-level classifier of points, a residual perceptron", mlp, MLPConfig, _PROVIDES),
    ]


@hookimpl
def register_objectives() -> Iterable[Objective]:
    return [
        Objective(
            "cdm",
            "Cross-entropy of the noise level plus denoising error",
            "cdm_plugins_cdm.objective:CDMObjective",
            ObjectiveConfig,
            requires=("noise_level_logits",),
        )
    ]


@hookimpl
def register_checkpoint_formats() -> Iterable[CheckpointFormat]:
    target = "cdm_plugins_cdm.checkpoint:read_official"
    return [CheckpointFormat("official", "Training checkpoint of shaharYadin/CDM", target)]


@hookimpl
def register_recipes() -> Iterable[Recipe]:
    return RECIPES


@hookimpl
def register_commands() -> Iterable[Command]:
    target = "cdm_plugins_cdm.levels:command"
    return [Command("levels", "Noise-level estimation: accuracy, confusion, denoising error", target)]
