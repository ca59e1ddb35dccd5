"""What plugin joint registers: joint diffusion (Deja, Trzcinski & Tomczak 2023, arXiv 2301.13622)."""

from __future__ import annotations

from collections.abc import Iterable

from cdm_core import hookimpl
from cdm_core.records import Adapter, CheckpointFormat, Command, Dataset, Metric, Model, Objective, Recipe
from cdm_plugins_joint.adapter_configs import RepresentationConfig, ThroughDecoderConfig
from cdm_plugins_joint.configs import (
    CelebAAttributesConfig,
    DomainsConfig,
    JointConfig,
    JointObjectiveConfig,
    PartlyLabelledConfig,
)
from cdm_plugins_joint.recipes import RECIPES

_HERE = "cdm_plugins_joint"
_PROVIDES = ("denoise", "class_logits", "representations")


@hookimpl
def register_models() -> Iterable[Model]:
    target = f"{_HERE}.model:JointModel"
    return [Model("unet", "A U-Net that denoises and classifies", target, JointConfig, _PROVIDES)]


@hookimpl
def register_objectives() -> Iterable[Objective]:
    return [
        Objective(
            "joint",
            "Denoising, and classification by the same features",
            f"{_HERE}.objective:JointObjective",
            JointObjectiveConfig,
            requires=_PROVIDES,
        )
    ]


@hookimpl
def register_adapters() -> Iterable[Adapter]:
    target, requires = f"{_HERE}.adapter:guided", ("denoise", "representations")
    return [
        Adapter(
            "representations",
            "Moves the U-Net's representations by its own head (Deja et al. 2023)",
            target,
            RepresentationConfig,
            ("denoise",),
            requires,
        ),
        Adapter(
            "representations-safe",
            "The same, differentiated through the decoder",
            target,
            ThroughDecoderConfig,
            ("denoise",),
            requires,
        ),
    ]


@hookimpl
def register_datasets() -> Iterable[Dataset]:
    module = f"{_HERE}.semi_supervised"
    return [
        Dataset(
            "partly-labelled",
            "Another data set with few labels",
            f"{module}:partly_labelled",
            PartlyLabelledConfig,
        ),
        Dataset("domains", "One data set with labels, another without", f"{module}:domains", DomainsConfig),
        Dataset(
            "celeba-attributes",
            "CelebA faces with 40 attributes",
            f"{_HERE}.attributes:celeba",
            CelebAAttributesConfig,
        ),
    ]


@hookimpl
def register_metrics() -> Iterable[Metric]:
    return [
        Metric(
            "classifier",
            "Calibration of the head, and accuracy by noise level",
            f"{_HERE}.evaluate:classifier",
            requires=("class_logits", "representations"),
        )
    ]


@hookimpl
def register_checkpoint_formats() -> Iterable[CheckpointFormat]:
    target = f"{_HERE}.checkpoint:read_official"
    return [CheckpointFormat("released", "Weights of KamilDeja/joint_diffusion", target)]


@hookimpl
def register_recipes() -> Iterable[Recipe]:
    return RECIPES


@hookimpl
def register_commands() -> Iterable[Command]:
    commands = f"{_HERE}.commands"
    return [
        Command("counterfactual", "Images changed to another class", f"{commands}:counterfactual"),
        Command("probe", "Linear probes of frozen features, by noise level and map", f"{commands}:probe"),
    ]
