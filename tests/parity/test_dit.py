"""Agreement with the official DiT, tensor for tensor."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm_core import samplers
from cdm_core.adapter_configs import CFGConfig
from cdm_core.adapters import ClassifierFreeGuidance
from cdm_core.data import DataInfo
from cdm_core.samplers import Conditional
from cdm_plugins_guidance.diffusers_configs import Transformer2DConfig
from cdm_plugins_guidance.diffusers_weights import dit_to_diffusers
from cdm_plugins_guidance.dit import DiT
from cdm_plugins_guidance.dit_configs import DiTConfig

SYSTEMS = ("DiT",)
FORWARD, BACKWARD = 2e-5, 1e-4


def describe(golden: Any) -> tuple[DiTConfig, DataInfo]:
    """Settings and data of the file, from its metadata alone."""
    net = golden.metadata["config"]
    config = DiTConfig(
        patch_size=net["patch_size"],
        depth=net["depth"],
        hidden_size=net["hidden_size"],
        num_heads=net["num_heads"],
        mlp_ratio=net.get("mlp_ratio", 4.0),
        learn_sigma=net["learn_sigma"],
        cfg_channels=golden.metadata["cfg_channels"],
    )
    shape = (net["in_channels"], net["input_size"], net["input_size"])
    return config, DataInfo("golden", shape, net["num_classes"], levels=None)


def build(golden: Any) -> DiT:
    """The net of the file; the positions, computed here, are the recorded ones to the last bit or two."""
    model = DiT(*describe(golden))
    torch.testing.assert_close(model.pos_embed, golden.weights["pos_embed"], rtol=0, atol=1e-6)
    model.load_state_dict(golden.weights)
    return model.eval()


def recorded_steps(golden: Any, model: DiT) -> Tensor:
    """The steps of `out/model_cfg`, not in the files: those at which channels agree that are not guided."""
    x, y, kept = golden.inputs["x"], golden.inputs["y"], golden.expected["out/model_cfg"]
    first = golden.metadata["cfg_channels"]
    likely = [5, 500]
    chunks = [likely, *torch.arange(len(model.path)).split(64)]
    found: list[int] = []
    for image, label, wanted in zip(x, y, kept, strict=False):
        for chunk in chunks:
            steps = torch.as_tensor(chunk)
            out = model(image.expand(len(steps), -1, -1, -1), steps, label.expand(len(steps)))
            errors = (out - wanted)[:, first:].abs().amax((1, 2, 3)) / wanted[first:].abs().max()
            if errors.min() <= FORWARD:
                found.append(int(steps[errors.argmin()]))
                break
    assert len(found) == len(x), "no step at which the unguided channels are the recorded ones"
    return torch.tensor(found)


def check_guided(golden: Any, model: DiT, guided: ClassifierFreeGuidance) -> None:
    """The official output: images with their classes, then with none, the first channels guided in both."""
    x, y, first = golden.inputs["x"], golden.inputs["y"], golden.metadata["cfg_channels"]
    t = recorded_steps(golden, model)
    x_ve, sigma = model.path.to_ve(x, t)
    x0, variance = guided.predict(x_ve, sigma, y)
    guided_eps = model.path.x0_to_eps(x, x0, t)
    with_class = guided_eps if variance is None else torch.cat([guided_eps, 2 * variance - 1], dim=1)
    without = torch.cat([guided_eps[:, :first], model(x, t)[:, first:]], dim=1)
    golden.compare("out/model_cfg", torch.cat([with_class, without]), FORWARD)


@torch.no_grad()
def test_every_tensor(golden: Any) -> None:
    meta, inputs = golden.metadata, golden.inputs
    model = build(golden)
    x, y = inputs["x"], inputs["y"]
    golden.compare("out/model", model(x, inputs["t"], y), FORWARD)

    assert model.null_label == meta["null_class"]
    guided = ClassifierFreeGuidance(CFGConfig(meta["cfg_scale"] - 1), model)  # 1 + w times the conditional
    check_guided(golden, model, guided)

    sigmas = model.sigmas[torch.tensor(meta["timestep_map"])].flip(0)
    noise = iter(inputs["ddpm_noise"])  # for a doubled batch, of which the first half is the sample
    start = x / model.scale(sigmas[:1]).float()
    sample = samplers.ddpm(
        Conditional(guided, y),
        start,
        sigmas,
        noise=lambda x: next(noise)[: len(x)],
        variance="learned" if model.learned_variance else "large",
    )
    assert next(noise, None) is None  # every recorded draw was used, in order
    golden.compare("out/sample_cfg", sample, BACKWARD)
    golden.assert_all_compared()


@torch.no_grad()
def test_as_a_network_of_diffusers(golden: Any) -> None:
    """The same weights in the library's class, put right, compute what the official network does."""
    pytest.importorskip("diffusers", reason="the library diffusers is not installed")
    from cdm_plugins_guidance.diffusers_models import Transformer2D

    config, info = describe(golden)
    settings, weights = dit_to_diffusers(golden.weights, config)
    model = Transformer2D(Transformer2DConfig(json.dumps(settings)), info).eval()
    model.net.load_state_dict(weights)
    golden.compare("out/model", model(golden.inputs["x"], golden.inputs["t"], golden.inputs["y"]), FORWARD)
