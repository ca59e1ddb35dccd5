"""From an adapter's settings to a guided denoiser: the classifiers loaded, the guides made, all checked."""

from __future__ import annotations

import os
from typing import Any

import torch

from cdm_core.capabilities import offered
from cdm_core.errors import UserError
from cdm_plugins_guidance import apply_configs
from cdm_plugins_guidance.adapter_configs import GuidedConfig, OneGuide
from cdm_plugins_guidance.apply import GuidedDenoiser
from cdm_plugins_guidance.classifiers import ALLOW_TARGETS, load_classifier, own_classifier
from cdm_plugins_guidance.guide import Guide


def guided(config: GuidedConfig, model: Any) -> GuidedDenoiser:
    """`model`, which can denoise, steered as `config` says.

    Raises `UserError` where a classifier cannot be had, or does not fit the model or the other guides.
    """
    terms = (config, *config.others)
    guides = [make_guide(term, model) for term in terms]
    applied = apply_configs.GuidedConfig(terms, config.condition)
    return GuidedDenoiser(applied, model, guides)


def make_guide(config: OneGuide, model: Any) -> Guide:
    """The guide of one term; its classifier is where the model is."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if config.classifier.name:
        # A run brings its settings with it: what code they name is not for their author to run here.
        allowed = os.environ.get(ALLOW_TARGETS) == "1"
        classifier = load_classifier(config.classifier, device, targets=allowed)
        return Guide(classifier, config.guide, decode=getattr(model, "to_images", None))
    if "class_logits" not in offered(model):
        raise UserError(
            "guidance needs a classifier, and this model has no `class_logits` of its own: name one, e.g. "
            "--set adapter.classifier.name=torchvision:resnet50, or run:RUN for a run of yours"
        )
    return Guide(own_classifier(model, config.classifier), config.guide)
