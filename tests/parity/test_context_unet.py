"""Agreement with the published MNIST diffusion classifier, tensor for tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cdm_core import samplers
from cdm_core.adapter_configs import CFGConfig
from cdm_core.adapters import ClassifierFreeGuidance
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.schedules import linear

SYSTEMS = ("MNIST diffusion classifier",)
FORWARD, BACKWARD = 2e-5, 1e-4

context_unet = pytest.importorskip("cdm_plugins_zeroshot.context_unet", reason="plugin zeroshot is not here")
from cdm_plugins_zeroshot.context_checkpoint import read_context  # noqa: E402
from cdm_plugins_zeroshot.context_unet_configs import ContextUnetConfig  # noqa: E402
from cdm_plugins_zeroshot.factored import factored  # noqa: E402


def describe(golden: Any) -> tuple[ContextUnetConfig, DataInfo]:
    """Settings and data of the file: its metadata, and the shape of its images."""
    meta = golden.metadata
    start, end = meta["betas"]
    config = ContextUnetConfig(meta["n_feat"], meta["n_T"], beta_start=start, beta_end=end)
    return config, DataInfo("golden", tuple(golden.inputs["x0"].shape[1:]), meta["n_classes"])


def network(golden: Any) -> dict[str, Tensor]:
    """The weights of the network, without the wrapper's tables."""
    prefix = "nn_model."
    weights = golden.weights.items()
    return {name.removeprefix(prefix): value for name, value in weights if name.startswith(prefix)}


def build(golden: Any) -> Any:
    model = context_unet.ContextUnet(*describe(golden))
    model.load_state_dict(network(golden))
    return model.eval()


def check_levels(golden: Any, model: Any) -> None:
    """The recorded tables, which are in float32 from their sums on, are those of our path."""
    weights, path = golden.weights, model.path
    torch.testing.assert_close(2 * path.alpha.float(), weights["sqrtab"][1:], rtol=1e-5, atol=0)
    torch.testing.assert_close(path.sigma.float(), weights["sqrtmab"][1:], rtol=0, atol=1e-5)


class Official:
    """The model in the official units: u = (x0 + 1) / 2 in [0, 1], noise levels half of ours."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def denoise(self, u: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        return (self.model.denoise(2 * u - 1, 2 * sigma, y) + 1) / 2


def guided_sample(golden: Any, model: Any) -> Tensor:
    """DDPM as recorded: large variances, from u_T ~ N(0, I), to the state at level 0, noisy still."""
    meta, inputs = golden.metadata, golden.inputs
    y = torch.arange(len(inputs["x_T"])) % meta["n_classes"]
    path = linear(meta["n_T"] + 1, *meta["betas"])
    sigmas, alphas = path.ve_sigma[1:-1].flip(0), path.alpha[1:-1].flip(0)
    draws = [*inputs["ddpm_noise"], *torch.zeros(2, *inputs["x_T"].shape)]  # none at the last steps
    noise, states = iter(draws), []
    samplers.ddpm(
        samplers.Conditional(Official(ClassifierFreeGuidance(CFGConfig(meta["guide_w"]), model)), y),
        inputs["x_T"] / float(alphas[0]),
        sigmas,
        noise=lambda _: next(noise),
        callback=lambda step, total, u, u0: states.append(u),
        variance="large",
    )
    assert next(noise, None) is None  # every recorded draw was used, in order
    return float(alphas[-1]) * states[-1]


def monte_carlo(golden: Any, model: Any) -> Tensor:
    """Mean squared error of eps, (rounds, images, classes), as |x0 - D|^2 / sigma^2, in two halves."""
    x0, halves = 2 * golden.inputs["x0"] - 1, factored(model)
    classes, rounds = golden.metadata["n_classes"], []
    pair, y = (torch.cartesian_prod(torch.arange(len(x0)), torch.arange(classes))).unbind(1)
    for t, eps in zip(golden.inputs["mc_t"], golden.inputs["mc_noise"], strict=True):
        sigma = model.sigmas[t - 1].float()
        features = halves.encode(x0 + sigma.view(-1, 1, 1, 1) * eps, sigma)
        guess = halves.decode(features.rows(pair), sigma[pair], y)
        error = (x0[pair] - guess).square().flatten(1).mean(1) / sigma[pair] ** 2
        rounds.append(error.view(len(x0), classes))
    return torch.stack(rounds)


@torch.no_grad()
def test_every_tensor(golden: Any) -> None:
    inputs, model = golden.inputs, build(golden)
    check_levels(golden, model)
    t, u, eps = inputs["t"] - 1, inputs["x0"], inputs["noise"]
    x_t = model.path.noised(2 * u - 1, t, eps)
    official = x_t + model.path.alpha[t].float().view(-1, 1, 1, 1)
    golden.compare("out/x_t", official, FORWARD)

    for net in (model, factored(model)):
        golden.compare("out/eps_cond", net(x_t, t, inputs["c"]), FORWARD)
        golden.compare("out/eps_uncond", net(x_t, t), FORWARD)

    errors = monte_carlo(golden, model)
    golden.compare("out/mc_errors", errors, FORWARD)
    golden.compare("out/class", errors.sum(0).argmin(1), 0.0)
    golden.compare("out/sample_cfg", guided_sample(golden, model), BACKWARD)
    golden.assert_all_compared()


def test_the_file_as_a_checkpoint(golden: Any, tmp_path: Any) -> None:
    """The reader makes of the weights alone what the metadata says."""
    path = tmp_path / "model_49.safetensors"
    save_file(golden.weights, path)
    foreign = read_context(path)
    assert foreign is not None
    config, info = describe(golden)
    assert foreign.model.config == config
    assert (foreign.info.shape, foreign.info.num_classes) == (info.shape, info.num_classes)
    context_unet.ContextUnet(config, info).load_state_dict(dict(foreign.state_dict))
    with pytest.raises(UserError, match="n_feat must be a multiple"):
        read_context(path, ("model.n_feat=12",))
