"""Agreement with the official classification diffusion models, tensor for tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cdm_core import samplers
from cdm_core.adapter_configs import CFGConfig
from cdm_core.adapters import ClassifierFreeGuidance
from cdm_core.data import DataInfo
from cdm_kernels import cumulative_logits
from cdm_plugins_cdm.configs import ObjectiveConfig, UNetConfig
from cdm_plugins_cdm.objective import CDMObjective, terms
from cdm_plugins_cdm.unet import UNet

SYSTEMS = ("CDM",)
FORWARD, BACKWARD = 2e-5, 1e-4


class Recorded:
    """Draws that are the recorded ones; no label is dropped."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = inputs

    def integers(self, high: int, *shape: int) -> Tensor:
        return self.inputs["t"]

    def normal(self, *shape: int) -> Tensor:
        return self.inputs["noise"]

    def uniform(self, *shape: int) -> Tensor:
        return torch.ones(len(self.inputs["t"]))


def build(golden: Any) -> UNet:
    """The net of the file, from its metadata alone."""
    meta, net = golden.metadata, golden.metadata["config"]
    config = UNetConfig(
        conditional=meta["conditional"],
        path="ot_official" if meta["flow_matching"] else "linear",
        noise_steps=meta["noise_steps"],
        beta_start=meta["beta_start"],
        beta_end=meta["beta_end"],
        channels=net["channels"],
        ch_mult=tuple(net["ch_mult"]),
        num_res_blocks=net["num_res_blocks"],
        attn_resolutions=tuple(net["attn_resolutions"]),
        dropout=net["dropout"],
        resamp_with_conv=net["resamp_with_conv"],
    )
    classes = net["num_classes"] - 1 if meta["conditional"] else None  # the official count has the null class
    info = DataInfo("golden", (net["in_channels"], net["image_size"], net["image_size"]), classes)
    model = UNet(config, info)
    model.load_state_dict(golden.weights)
    assert len(model.path) == net["out_channels"]
    return model.eval()


def check_losses(golden: Any, model: UNet, y: Tensor | None) -> None:
    """Head, logits, eps, both losses, their sum, and its gradient in every parameter."""
    meta, inputs = golden.metadata, golden.inputs
    level, eps = inputs["t"], inputs["noise"]
    x_t = model.path.noised(inputs["x0"], level, eps)
    golden.compare("out/x_t", x_t, FORWARD)
    o = model(x_t, y)
    golden.compare("out/head", o, FORWARD)
    golden.compare("out/logits", cumulative_logits(o), FORWARD)
    x_t.requires_grad_()
    golden.compare("out/eps", model.predict_noise(model.features(x_t, y), x_t, level), BACKWARD)
    parts = terms(model, x_t, level, eps, y)
    golden.compare("out/ce", parts.cross_entropy.mean(), FORWARD)
    golden.compare("out/mse", parts.squared_error.mean(), BACKWARD)

    objective = CDMObjective(ObjectiveConfig(meta["ce_factor"], meta["mse_factor"]))
    loss = objective(model, inputs["x0"], y, Recorded(inputs))["loss"]
    golden.compare("out/loss", loss, BACKWARD)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(meta["grad_names"]) == set(gradients)
    check_gradients(golden, gradients)
    assert not model.linear_layer.weight.grad[0].any()


def check_gradients(golden: Any, gradients: dict[str, Tensor]) -> None:
    """Every recorded gradient, and every norm by itself.

    Some parameters do nothing (a bias before the norm of its own channel): their recorded gradients are
    errors, some 1e-8 of the others.
    """
    norms = golden.expected["out/grad_norms"]
    floor = float(1e-3 * norms.max())
    golden.compared.add("out/grad_norms")
    for name, norm in zip(golden.metadata["grad_names"], norms.tolist(), strict=True):
        assert abs(gradients[name].norm().item() - norm) <= BACKWARD * max(norm, floor), name
    for name in golden.expected:
        if name.startswith("grad/"):
            golden.compare(name, gradients[name.removeprefix("grad/")], BACKWARD, floor)


def check_likelihood(golden: Any, model: UNet, y: Tensor | None) -> None:
    """Nats of the clean images; the official bits/dim, which take 128 for the 127.5 grey levels a unit."""
    with torch.no_grad():
        nats = model.log_density(golden.inputs["x0"], y)
    golden.compare("out/log_likelihood_nats", nats, FORWARD)
    dim = golden.inputs["x0"][0].numel()
    golden.compare("out/bits_per_dim", -nats / (dim * math.log(2)) + 7, FORWARD)


def check_samples(golden: Any, model: UNet, y: Tensor | None) -> None:
    """Samples on the official grid, with the recorded noise, in the variance-exploding currency."""
    visited = torch.tensor(golden.metadata["timesteps_visited"])
    every = model.path.levels
    start = golden.inputs["x_T"]
    guided: Any = model
    if golden.metadata["w_cfg"]:
        guided = ClassifierFreeGuidance(CFGConfig(golden.metadata["w_cfg"]), model)

    def walk(sampler: Any, levels: Tensor, **options: Any) -> Tensor:
        sigmas = model.path.ve_sigma[levels].sort(descending=True).values
        labels = None if y is None else y[: len(start)]
        x = start / model.scale(sigmas[:1]).float()
        return sampler(lambda x, sigma: guided.denoise(x, sigma, labels), x, sigmas, **options)

    if golden.metadata["flow_matching"]:
        states: list[Tensor] = []
        walk(samplers.euler, visited, callback=lambda i, n, x, x0: states.append(x))
        scaled = torch.stack(
            [model.path.to_path(x, level) for x, level in zip(states, visited[:, None], strict=True)]
        )
        golden.compare("out/fm_euler_states", scaled, BACKWARD)
        return
    noise = iter(golden.inputs["ddpm_noise"])
    samples = {
        "ddim": walk(samplers.ddim, visited),
        "second_order_dpm_solver": walk(samplers.dpm_solver, visited),
        "ddpm": walk(samplers.ddpm, every, noise=lambda x: next(noise)),
    }
    assert next(noise, None) is None  # every recorded draw was used, in order
    for name, sample in samples.items():
        golden.compare(f"out/sample_{name}", sample, BACKWARD)
        check_uint8(golden, f"out/sample_{name}_uint8", sample)


def check_uint8(golden: Any, name: str, sample: Tensor) -> None:
    """The official pictures are truncated (ours are rounded): the same integers but for float noise."""
    levels = (sample.clamp(-1, 1).double() + 1) / 2 * 255
    wrong = levels.floor() != golden.expected[name]
    golden.compared.add(name)
    tolerance = BACKWARD * 255 * sample.abs().max()
    assert (levels[wrong] - levels[wrong].round()).abs().le(tolerance).all()
    assert (levels.floor() - golden.expected[name].double()).abs().max() <= 1


def test_every_tensor(golden: Any) -> None:
    model = build(golden)
    y = golden.inputs.get("y")
    check_losses(golden, model, y)
    check_likelihood(golden, model, y)
    check_samples(golden, model, y)
    golden.assert_all_compared()
