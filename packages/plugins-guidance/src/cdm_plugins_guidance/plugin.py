"""What plugin guidance registers: off-the-shelf guidance (Ma et al. 2024, arXiv 2310.11311)."""

from __future__ import annotations

from collections.abc import Iterable

from cdm_core import hookimpl
from cdm_core.records import Adapter, CheckpointFormat, Command, Model, Objective, Recipe, Sampler
from cdm_plugins_guidance.adapter_configs import ADAPTERS, CONFIGS
from cdm_plugins_guidance.adm_configs import ClassifierConfig, UNetConfig
from cdm_plugins_guidance.apply_configs import RecurrentConfig
from cdm_plugins_guidance.classifier_configs import ClassificationConfig, ResNetConfig
from cdm_plugins_guidance.diffusers_configs import Transformer2DConfig, UNet2DConfig
from cdm_plugins_guidance.dit_configs import DiTConfig
from cdm_plugins_guidance.edm_configs import EDMConfig, EDMObjectiveConfig
from cdm_plugins_guidance.pair_configs import PairConfig, PairObjectiveConfig
from cdm_plugins_guidance.recipes import RECIPES

_HERE = "cdm_plugins_guidance"
_DENOISE, _CLASSIFY = ("denoise",), ("class_logits",)


@hookimpl
def register_models() -> Iterable[Model]:
    diffusers = f"{_HERE}.diffusers_models"
    return [
        Model("pair", "A denoiser and a classifier", f"{_HERE}.pair:Pair", PairConfig, _DENOISE + _CLASSIFY),
        Model("adm", "ADM's U-Net (Dhariwal & Nichol 2021)", f"{_HERE}.adm:ADM", UNetConfig, _DENOISE),
        Model("edm", "EDM's networks (Karras et al. 2022)", f"{_HERE}.edm:EDM", EDMConfig, _DENOISE),
        Model("dit", "Diffusion transformer (Peebles & Xie 2023)", f"{_HERE}.dit:DiT", DiTConfig, _DENOISE),
        Model("diffusers-unet2d", "UNet2DModel of diffusers", f"{diffusers}:UNet2D", UNet2DConfig, _DENOISE),
        Model(
            "diffusers-dit",
            "DiTTransformer2DModel of diffusers",
            f"{diffusers}:Transformer2D",
            Transformer2DConfig,
            _DENOISE,
        ),
        Model(
            "classifier",
            "Residual network for clean images",
            f"{_HERE}.classifier:Classifier",
            ResNetConfig,
            _CLASSIFY,
        ),
        Model(
            "noisy-classifier",
            "ADM's classifier of noisy images",
            f"{_HERE}.adm:NoisyClassifier",
            ClassifierConfig,
            _CLASSIFY,
        ),
    ]


@hookimpl
def register_objectives() -> Iterable[Objective]:
    return [
        Objective(
            "pair",
            "Denoising and classification, side by side",
            f"{_HERE}.pair:PairObjective",
            PairObjectiveConfig,
            requires=_DENOISE + _CLASSIFY,
        ),
        Objective(
            "edm",
            "Weighted denoising at any noise level (Karras et al. 2022)",
            f"{_HERE}.edm_objective:EDMObjective",
            EDMObjectiveConfig,
            requires=_DENOISE,
        ),
        Objective(
            "classification",
            "Cross-entropy of clean images",
            f"{_HERE}.classifier:Classification",
            ClassificationConfig,
            requires=_CLASSIFY,
        ),
    ]


@hookimpl
def register_samplers() -> Iterable[Sampler]:
    target = f"{_HERE}.recurrent:recurrent"
    summary = "DDIM that takes its steps several times (Bansal et al. 2023)"
    return [Sampler("recurrent", summary, target, RecurrentConfig, (), _DENOISE)]


@hookimpl
def register_adapters() -> Iterable[Adapter]:
    target = f"{_HERE}.adapter:guided"
    return [
        Adapter(name, method.summary, target, CONFIGS[name], _DENOISE, _DENOISE + _CLASSIFY)
        for name, method in ADAPTERS.items()
    ]


@hookimpl
def register_checkpoint_formats() -> Iterable[CheckpointFormat]:
    return [
        CheckpointFormat("adm", "Weights of openai/guided-diffusion", f"{_HERE}.adm_checkpoint:read_adm"),
        CheckpointFormat("edm", "Pickles of NVlabs/edm, not unpickled", f"{_HERE}.edm_checkpoint:read_edm"),
        CheckpointFormat("dit", "Weights of facebookresearch/DiT", f"{_HERE}.dit_checkpoint:read_dit"),
        CheckpointFormat("pipeline", "Folders of diffusers", f"{_HERE}.diffusers_models:read_folder"),
    ]


@hookimpl
def register_commands() -> Iterable[Command]:
    commands = f"{_HERE}.commands"
    return [
        Command(
            "calibrate", "How far the guide's classifier can be trusted, by level", f"{commands}:calibrate"
        ),
        Command("tune", "Search for the guide's settings", f"{commands}:tune"),
        Command("ablate", "What each part of the guide is worth", f"{commands}:ablate"),
        Command("compare", "Guided, unguided and class-conditional, judged", f"{commands}:compare"),
        Command(
            "to-diffusers", "Write weights as a folder of diffusers", f"{_HERE}.diffusers_export:command"
        ),
    ]


@hookimpl
def register_recipes() -> Iterable[Recipe]:
    return RECIPES
