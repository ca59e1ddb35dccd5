"""What plugin zeroshot registers: diffusion classifiers (Li et al. 2023, arXiv 2303.16203)."""

from __future__ import annotations

from collections.abc import Iterable

from cdm_core import hookimpl
from cdm_core.records import Adapter, CheckpointFormat, Command, Model, Recipe
from cdm_plugins_zeroshot.context_unet_configs import ContextUnetConfig
from cdm_plugins_zeroshot.recipes import RECIPES
from cdm_plugins_zeroshot.stable_diffusion_configs import StableDiffusionConfig
from cdm_plugins_zeroshot.zeroshot_configs import ClassifierConfig

_HERE = "cdm_plugins_zeroshot"


@hookimpl
def register_models() -> Iterable[Model]:
    context, stable = f"{_HERE}.context_unet:ContextUnet", f"{_HERE}.stable_diffusion:StableDiffusion"
    has = ("denoise",)
    return [
        Model("context-unet", "Context U-Net, the class in its decoder", context, ContextUnetConfig, has),
        Model(
            "stable-diffusion", "Stable Diffusion, prompts for classes", stable, StableDiffusionConfig, has
        ),
    ]


@hookimpl
def register_adapters() -> Iterable[Adapter]:
    return [
        Adapter(
            "classifier",
            "The class whose denoising error is least",
            f"{_HERE}.adapter:DiffusionClassifier",
            ClassifierConfig,
            provides=("class_logits",),
            requires=("denoise",),
        )
    ]


@hookimpl
def register_checkpoint_formats() -> Iterable[CheckpointFormat]:
    context, stable = f"{_HERE}.context_checkpoint:read_context", f"{_HERE}.stable_diffusion:read_pipeline"
    return [
        CheckpointFormat("context-unet", "Weights of Svithjod/Diffusion_Classifier", context),
        CheckpointFormat("stable-diffusion", "Stable Diffusion in a folder of diffusers", stable),
    ]


@hookimpl
def register_recipes() -> Iterable[Recipe]:
    return RECIPES


@hookimpl
def register_commands() -> Iterable[Command]:
    commands = f"{_HERE}.commands"
    return [
        Command("classify", "The class of every image, with how sure that is", f"{commands}:classify"),
        Command("evaluate", "Accuracy, calibration and cost of ways to classify", f"{commands}:evaluate"),
        Command("ablate", "What each technique costs and is worth", f"{commands}:ablate"),
        Command("ood", "Images of another kind told from the run's own", f"{commands}:ood"),
    ]
