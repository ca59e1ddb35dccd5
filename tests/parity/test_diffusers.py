"""Official guided-diffusion weights as a network of the library diffusers, tensor for tensor."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from cdm_core.data import DataInfo
from cdm_plugins_guidance.diffusers_configs import UNet2DConfig
from cdm_plugins_guidance.diffusers_weights import adm_to_diffusers

SYSTEMS = ("guided-diffusion (ADM)",)
FORWARD = 2e-5


@torch.no_grad()
def test_the_network_computes_the_same(golden: Any) -> None:
    pytest.importorskip("diffusers", reason="the library diffusers is not installed")
    from cdm_plugins_guidance.diffusers_models import UNet2D

    if "unet" not in golden.metadata:
        pytest.skip("a classifier: the library has none")
    net = golden.metadata["unet"]
    by_number = net["num_head_channels"] == -1
    settings, weights = adm_to_diffusers(
        golden.weights,
        image_size=net["image_size"],
        layers=net["num_res_blocks"],
        num_heads=net["num_heads"],
        head_channels=None if by_number else net["num_head_channels"],
        legacy=not net["use_new_attention_order"],
    )
    config = UNet2DConfig(json.dumps(settings), num_heads=net["num_heads"] if by_number else None)
    shape = (net["in_channels"], net["image_size"], net["image_size"])
    model = UNet2D(config, DataInfo("golden", shape, net["num_classes"])).eval()
    model.net.load_state_dict(weights)
    inputs = golden.inputs
    golden.compare("out/model", model(inputs["x"], inputs["t"], inputs.get("y")), FORWARD)
