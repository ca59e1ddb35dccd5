"""Agreement with the official EDM: networks, preconditionings, samplers, and the pickle that holds them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cdm_core import samplers
from cdm_core.config import Merged, fill
from cdm_core.data import DataInfo
from cdm_plugins_guidance.edm import EDM, edm_grid
from cdm_plugins_guidance.edm_checkpoint import official_settings, read_edm
from cdm_plugins_guidance.edm_configs import EDMConfig
from cdm_plugins_guidance.edm_schedules import solve_in_time, vp_betas

SYSTEMS = tuple(f"EDM {network}" for network in ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"))
FORWARD, BACKWARD = 2e-5, 1e-4
CHURN, CHURN_MIN, CHURN_MAX, CHURN_NOISE = 40.0, 0.05, 50.0, 1.003  # published for ImageNet


def settings(golden: Any) -> tuple[EDMConfig, DataInfo]:
    """The model's and the data's settings, from the metadata alone."""
    tables = official_settings(golden.metadata["network"], golden.metadata["kwargs"], golden.path.name)
    config, info = (fill(c, tables[t], t, Merged()) for c, t in ((EDMConfig, "model"), (DataInfo, "data")))
    return config, info


def build(golden: Any) -> EDM:
    """The net of the file."""
    model = EDM(*settings(golden))
    model.load_state_dict(golden.weights)
    return model.eval()


def churned_on_levels(denoise: Any, model: EDM, x: Tensor, sigmas: Tensor, noise: Tensor) -> Tensor:
    """Heun with churn where the raised levels are rounded too, which core's sampler knows nothing of."""
    for i, (t, s) in enumerate(pairwise([*sigmas.tolist(), 0.0])):
        gamma = min(CHURN / len(sigmas), math.sqrt(2) - 1) if CHURN_MIN <= t <= CHURN_MAX else 0.0
        raised = float(model.round_sigma(torch.tensor([t + gamma * t], dtype=torch.float64)))
        x = x + math.sqrt(raised**2 - t**2) * CHURN_NOISE * noise[i]
        states: list[Tensor] = []
        levels = torch.tensor([raised, s] if s else [raised], dtype=torch.float64)
        x0 = samplers.heun(denoise, x, levels, callback=lambda i, n, x, x0, states=states: states.append(x))
        x = states[1] if s else x0
    return x


def check_samples(golden: Any, model: EDM, labels: Tensor | None) -> None:
    """The published samplers: float64 outside the net, float32 inside."""
    steps, latents = golden.metadata["steps"], golden.inputs["latents"].double()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return model(x.float(), sigma.float(), labels).double()

    grids = {kind: edm_grid(kind, steps, model) for kind in ("edm", "vp", "ve", "iddpm")}
    starts = {kind: latents * grid[0] for kind, grid in grids.items()}
    churn = iter(golden.inputs["churn_noise"])
    if model.config.precond == "iddpm":
        noisy = churned_on_levels(denoise, model, starts["edm"], grids["edm"], golden.inputs["churn_noise"])
    else:
        noisy = samplers.heun(
            denoise,
            starts["edm"],
            grids["edm"],
            noise=lambda x: next(churn),
            churn=CHURN,
            churn_min=CHURN_MIN,
            churn_max=CHURN_MAX,
            churn_noise=CHURN_NOISE,
        )
        assert next(churn, None) is None  # every recorded draw was used, in order
    samples = {
        "heun_deterministic": samplers.heun(denoise, starts["edm"], grids["edm"]),
        "heun_stochastic": noisy,
        "heun_iddpm": samplers.heun(denoise, starts["iddpm"], grids["iddpm"]),
        "heun_ve": solve_in_time(denoise, starts["ve"], grids["ve"]),
        "euler_vp": solve_in_time(denoise, starts["vp"], grids["vp"], betas=vp_betas(model), order=1),
    }
    for name, sample in samples.items():
        golden.compare(f"out/{name}", sample, BACKWARD)


def check_pickle(golden: Any) -> None:
    """The pickle beside the file, if any, is the same network; the source in it raises if it is run."""
    path = golden.path.with_suffix(".pkl")
    if not path.exists():
        return
    foreign = read_edm(path, ())
    assert foreign is not None
    config, info = settings(golden)
    assert foreign.model.config == config
    assert (foreign.info.shape, foreign.info.num_classes) == (info.shape, info.num_classes)
    assert foreign.state_dict.keys() == golden.weights.keys()
    for name, tensor in golden.weights.items():
        assert torch.equal(foreign.state_dict[name], tensor), name


@torch.no_grad()
def test_every_tensor(golden: Any) -> None:
    model = build(golden)
    labels, sigma = golden.inputs.get("class_labels"), golden.inputs["sigma"]
    x = golden.inputs["latents"] * sigma[:, None, None, None]
    golden.compare("out/denoised", model(x, sigma, labels), FORWARD)
    if labels is not None and model.config.precond != "iddpm":  # which rounds the whole of sigma
        assert torch.equal(model.denoise(x, sigma, labels.argmax(1)), model(x, sigma, labels))
    check_samples(golden, model, labels)
    check_pickle(golden)
    golden.assert_all_compared()
