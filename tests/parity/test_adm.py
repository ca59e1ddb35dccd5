"""Agreement with guided-diffusion, tensor for tensor: the U-Net, its diffusion, and the noisy classifier."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_core import samplers
from cdm_core.adapters import Clipped
from cdm_core.data import DataInfo
from cdm_core.denoisers import respaced
from cdm_core.denoising import DenoisingObjective, moments
from cdm_core.denoising_configs import DenoisingConfig
from cdm_plugins_guidance.adm import ADM, NoisyClassifier
from cdm_plugins_guidance.adm_configs import ClassifierConfig, UNetConfig

SYSTEMS = ("guided-diffusion (ADM)", "guided-diffusion noisy classifier")
FORWARD, BACKWARD = 2e-5, 1e-4


def build(golden: Any) -> ADM:
    """The net of the file, from its metadata alone."""
    net, diffusion = dict(golden.metadata["unet"]), golden.metadata["diffusion"]
    size, channels, classes = net.pop("image_size"), net.pop("in_channels"), net.pop("num_classes")
    learned = diffusion["learn_sigma"]
    assert net.pop("out_channels") == (1 + learned) * channels
    config = UNetConfig(
        **net | {key: tuple(net[key]) for key in ("channel_mult", "attention_resolutions")},
        class_cond=classes is not None,
        learn_sigma=learned,
        noise_schedule=diffusion["noise_schedule"],
        diffusion_steps=diffusion["steps"],
        predicts="x0" if diffusion.get("predict_xstart") else "eps",
    )
    config.check()
    model = ADM(config, DataInfo("golden", (channels, size, size), classes))
    model.load_state_dict(golden.weights)
    return model.eval()


def check_step(golden: Any, model: ADM, y: Tensor | None) -> None:
    """p_mean_variance: x0 clamped, the step's mean and log variance, all in the path's own scale."""
    x_t, t = golden.inputs["x"], golden.inputs["t_pmv"]
    value, variance = model.output(x_t, t, y)
    unclamped = model.to_x0(value, x_t, t)
    x0 = unclamped.clamp(-1, 1)
    check_x0(golden, x0, unclamped)
    before = torch.cat([torch.ones(1, dtype=torch.float64), model.path.alpha])[t]  # alpha at t - 1
    share, small, large = (row[t] for row in moments(model.path))

    def rows(coefficient: Tensor) -> Tensor:
        return coefficient.float()[:, None, None, None]

    x, _ = model.path.to_ve(x_t, t)
    golden.compare("out/pmv_mean", rows(before) * (rows(share) * x0 + rows(1 - share) * x), FORWARD)
    small, large = (rows(v + 2 * before.log()) for v in (small, large))
    if variance is None:
        log_variance = torch.where(rows(t) == 0, small, large).expand_as(x0)
    else:
        log_variance = variance * large + (1 - variance) * small
    golden.compare("out/pmv_log_variance", log_variance, FORWARD)


def check_x0(golden: Any, x0: Tensor, unclamped: Tensor) -> None:
    """At high noise x0 is the difference of two numbers 1 / alpha times as large, before it is clamped.

    Eight units in the last place of those are allowed: the official float32 is as far from float64.
    """
    golden.compared.add("out/pmv_pred_xstart")
    error = (x0 - golden.expected["out/pmv_pred_xstart"]).abs().amax((1, 2, 3))
    assert (error <= FORWARD + 8 * 2**-24 * unclamped.abs().amax((1, 2, 3))).all()


def check_losses(golden: Any, model: ADM, y: Tensor | None) -> None:
    """Each image's terms; the official sum has the bound's single term, unless it is rescaled by T / 1000."""
    x0, t, eps = (golden.inputs[key] for key in ("x0", "t_pmv", "noise"))
    diffusion, levels = golden.metadata["diffusion"], len(model.path)
    weight = 1e-3 if diffusion.get("rescale_learned_sigmas") else 1 / levels
    x_t = model.path.noised(x0, t, eps)
    golden.compare("out/q_sample", x_t, FORWARD)
    objective = DenoisingObjective(DenoisingConfig(vlb_weight=weight))
    rows: dict[str, list[Tensor]] = {"loss": [], "mse": [], "vlb": []}
    for i in range(len(x0)):
        one = slice(i, i + 1)
        terms = objective.loss(model, x0[one], x_t[one], t[one], eps[one], None if y is None else y[one])
        for name, value in terms.items():
            rows[name].append(value)
    golden.compare("out/loss_loss", torch.stack(rows["loss"]), FORWARD)
    golden.compare("out/loss_mse", torch.stack(rows["mse"]), FORWARD)
    if model.learned_variance:
        golden.compare("out/loss_vb", torch.stack(rows["vlb"]) * weight, FORWARD)


def check_samples(golden: Any, model: ADM, y: Tensor | None) -> None:
    """Respaced samples with the recorded noise; every prediction of x0 is clamped.

    In float64: a walk of an untrained net multiplies rounding errors, and the official ones are enough.
    """
    model = copy.deepcopy(model).double()
    clipped = samplers.Conditional(Clipped(model), y)

    def walk(sampler: Any, visited: list[int], **options: Any) -> Tensor:
        sigmas = model.path.ve_sigma[torch.tensor(visited)].flip(0)
        return sampler(clipped, golden.inputs["x_T"] / model.scale(sigmas[:1]), sigmas, **options)

    noise = iter(golden.inputs["ddpm_noise"].double())
    variance = "learned" if model.learned_variance else "large"
    visited = golden.metadata["timestep_map_ddpm"]
    assert visited == list(respaced(len(model.path), golden.metadata["diffusion"]["timestep_respacing"]))
    sample = walk(samplers.ddpm, visited, noise=lambda x: next(noise), variance=variance)
    assert next(noise, None) is None  # every recorded draw was used, in order
    golden.compare("out/sample_ddpm", sample, BACKWARD)
    visited = golden.metadata["timestep_map_ddim"]
    assert visited == list(respaced(len(model.path), f"ddim{len(visited)}"))
    golden.compare("out/sample_ddim", walk(samplers.ddim, visited), BACKWARD)


def check_classifier(golden: Any) -> None:
    """Logits, and the gradient of log p(y | x_t) in x_t."""
    net = dict(golden.metadata["encoder"])
    size, channels, classes = net.pop("image_size"), net.pop("in_channels"), net.pop("out_channels")
    settings = net | {key: tuple(net[key]) for key in ("channel_mult", "attention_resolutions")}
    config = ClassifierConfig(**settings)
    config.check()
    model = NoisyClassifier(config, DataInfo("golden", (channels, size, size), classes))
    model.load_state_dict(golden.weights)
    model.eval()
    x, t, y = (golden.inputs[key] for key in ("x", "t", "y"))
    x = x.clone().requires_grad_()
    logits = model(x, t)
    golden.compare("out/logits", logits, FORWARD)
    (gradient,) = torch.autograd.grad(-F.cross_entropy(logits, y, reduction="sum"), x)
    golden.compare("out/grad_log_prob", gradient, BACKWARD)


def test_every_tensor(golden: Any) -> None:
    if "encoder" in golden.metadata:
        check_classifier(golden)
    else:
        model = build(golden)
        y = golden.inputs.get("y")
        with torch.no_grad():
            golden.compare("out/model", model(golden.inputs["x"], golden.inputs["t"], y), FORWARD)
            check_step(golden, model, y)
            check_losses(golden, model, y)
            check_samples(golden, model, y)
    golden.assert_all_compared()
