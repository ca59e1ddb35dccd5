"""Agreement with off-the-shelf guidance as it was released, on ADM and on EDM, tensor for tensor."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdm_core import samplers
from cdm_core.adapters import Clipped
from cdm_core.data import DataInfo
from cdm_core.denoisers import respaced
from cdm_plugins_guidance.adm import ADM
from cdm_plugins_guidance.adm_configs import UNetConfig
from cdm_plugins_guidance.apply import GuidedDenoiser
from cdm_plugins_guidance.apply_configs import GuidedConfig, TermConfig
from cdm_plugins_guidance.edm import EDM, edm_grid
from cdm_plugins_guidance.edm_configs import EDMConfig
from cdm_plugins_guidance.guide import Guide
from cdm_plugins_guidance.guide_configs import GuideConfig
from cdm_plugins_guidance.softplus import smooth

DDPM, EDM_ = "EluCD off-the-shelf guidance, DDPM", "EluCD off-the-shelf guidance, EDM"
SYSTEMS = (DDPM, EDM_)
FORWARD, BACKWARD = 2e-5, 1e-4


def weights(golden: Any, net: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{net}/"): value
        for key, value in golden.weights.items()
        if key.startswith(f"{net}/")
    }


def classifier(golden: Any, classes: int, size: int) -> nn.Module:
    """The torchvision ResNet that the metadata spell out, its ReLUs made smooth."""
    resnet = pytest.importorskip("torchvision").models.resnet
    text = golden.metadata["classifier"]
    found = re.fullmatch(r"torchvision ResNet\((\w+),\s*(\[[^]]*\])((?:,\s*\w+=\d+)*)\)", text)
    assert found, text
    options = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", found[3])}
    net = resnet.ResNet(getattr(resnet, found[1]), json.loads(found[2]), num_classes=classes, **options)
    net.load_state_dict(weights(golden, "classifier"))
    net.eval().num_classes = classes
    smooth(net, golden.metadata["softplus_beta"], torch.zeros(1, 3, size, size))
    return net


def unet(golden: Any) -> ADM:
    net, diffusion = dict(golden.metadata["unet"]), golden.metadata["diffusion"]
    size, channels, classes = net.pop("image_size"), net.pop("in_channels"), net.pop("num_classes")
    assert net.pop("out_channels") == (1 + diffusion["learn_sigma"]) * channels
    config = UNetConfig(
        **net | {key: tuple(net[key]) for key in ("channel_mult", "attention_resolutions")},
        class_cond=classes is not None,
        learn_sigma=diffusion["learn_sigma"],
        noise_schedule=diffusion["noise_schedule"],
        diffusion_steps=diffusion["steps"],
    )
    config.check()
    model = ADM(config, DataInfo("golden", (channels, size, size), classes))
    model.load_state_dict(weights(golden, "unet"))
    return model.eval()


def ddpm(golden: Any) -> tuple[Guide, Any, Any]:
    """The guide, and functions that make a guided denoiser and sample from it for rows of the batch."""
    meta, model = golden.metadata, unet(golden)
    settings = GuideConfig(tau1=meta["joint_temperature"], discount=meta["margin_temperature_discount"])
    guide = Guide(classifier(golden, meta["classes"], meta["unet"]["image_size"]), settings)
    fixed = "small" if meta["diffusion"].get("sigma_small") else "large"
    visited = respaced(len(model.path), meta["diffusion"]["timestep_respacing"])
    sigmas = model.path.ve_sigma[torch.tensor(visited)].flip(0)

    def guided(peak: str) -> GuidedDenoiser:
        term = TermConfig(
            look="x0",
            rule="mean",
            scale=meta["classifier_scale"],
            gamma=meta["gamma_factor"],
            variance="auto" if model.learned_variance else fixed,  # type: ignore[arg-type]
            peak=peak,  # type: ignore[arg-type]
        )
        config = GuidedConfig(terms=(term,), condition=meta["unet"]["num_classes"] is not None)
        config.check()
        return GuidedDenoiser(config, Clipped(model), [guide])

    def sample(denoiser: GuidedDenoiser, rows: slice = slice(None)) -> Tensor:
        noise = iter(golden.inputs["ddpm_noise"])
        start = golden.inputs["x_T"][rows] / model.scale(sigmas[:1]).float()
        walk = samplers.Conditional(denoiser, golden.inputs["y"][rows])
        variance = "learned" if model.learned_variance else fixed
        out = samplers.ddpm(walk, start, sigmas, noise=lambda x: next(noise)[rows], variance=variance)
        assert next(noise, None) is None  # every recorded draw was used, in order
        return out

    return guide, guided, sample


def check_ddpm(golden: Any) -> None:
    """The guide at the first prediction; the sample; and that our own schedule leaves the batch alone."""
    guide, guided, sample = ddpm(golden)
    graded = guide.gradient(golden.inputs["first_pred_xstart"], golden.inputs["y"])
    golden.compare("out/first_log_ratio", graded.value, FORWARD)
    golden.compare("out/first_logits", graded.logits, FORWARD)
    golden.compare("out/first_grad", graded.gradient, BACKWARD)
    together = sample(guided("official"))
    golden.compare("out/sample", together, BACKWARD)

    rows = [slice(i, i + 1) for i in range(len(together))]
    ours = sample(guided("first"))
    alone = torch.cat([sample(guided("first"), row) for row in rows])
    assert float((alone - ours).abs().max()) <= BACKWARD * float(ours.abs().max())
    if golden.metadata["diffusion"]["learn_sigma"]:  # fixed variances have one maximum, the first
        assert not torch.equal(ours, together)


def check_edm(golden: Any) -> None:
    """EDM's sampler without churn: one nudge a step, none in Heun's second half."""
    meta = golden.metadata
    net = dict(meta["kwargs"])
    size, channels, classes = net.pop("img_resolution"), net.pop("img_channels"), net.pop("label_dim")
    config = EDMConfig(
        precond=meta["network"].removesuffix("Precond").lower(),
        conditional=classes > 0,
        **net | {key: tuple(net[key]) for key in ("channel_mult", "attn_resolutions")},
    )
    model = EDM(config, DataInfo("golden", (channels, size, size), classes or None))
    model.load_state_dict(weights(golden, "network"))
    model.eval()
    settings = GuideConfig(tau1=meta["joint_temperature"], tau2=meta["uncond_temperature"])
    y = golden.inputs["class_labels"].argmax(1)
    guide = Guide(classifier(golden, golden.inputs["class_labels"].shape[1], size), settings)
    term = TermConfig(
        look="rms",
        rule="nudge",
        schedule="linear-sine",
        scale=meta["max_guidance"],
        sine=meta["add_factor"],
        normalise="rms",
    )
    guided = GuidedDenoiser(GuidedConfig(terms=(term,), condition=classes > 0), _InFloat32(model), [guide])
    sigmas = edm_grid("edm", meta["steps"], model)
    start = golden.inputs["latents"].double() * sigmas[0]
    noise = iter(golden.inputs["noise"])
    walk = samplers.Conditional(guided, y)
    golden.compare("out/sample", samplers.heun(walk, start, sigmas, noise=lambda x: next(noise)), BACKWARD)


class _InFloat32:
    """A float32 network asked from a float64 state, as EDM's sampler does."""

    def __init__(self, model: EDM) -> None:
        self.model, self.num_classes = model, model.num_classes

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        return self.model.denoise(x.float(), sigma.float(), y).to(x.dtype)


def test_every_tensor(golden: Any) -> None:
    if golden.metadata["system"] == DDPM:
        check_ddpm(golden)
    else:
        check_edm(golden)
    golden.assert_all_compared()
