"""Checkpoints of the MNIST diffusion classifier: sizes from shapes, levels from tables, nothing run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.testing.conformance import randomise
from cdm_plugins_zeroshot.context_checkpoint import read_context
from cdm_plugins_zeroshot.context_unet import ContextUnet
from cdm_plugins_zeroshot.context_unet_configs import ContextUnetConfig

TINY = ContextUnetConfig(n_feat=8, n_T=30)
DIGITS = DataInfo("converted", (1, 28, 28), 10, dequantise=False)
SIGN = "Not told by the file: sign of the one-hot class, taken for -1."


def network(config: ContextUnetConfig = TINY, info: DataInfo = DIGITS) -> ContextUnet:
    torch.manual_seed(0)
    model = ContextUnet(config, info)
    randomise(model)
    return model.eval()


def tables(beta: Tensor) -> dict[str, Tensor]:
    """What the wrapper keeps beside its network, by its names, in float32."""
    alpha, signal = 1 - beta, (1 - beta).log().cumsum(0).exp()
    return {
        "alpha_t": alpha,
        "oneover_sqrta": 1 / alpha.sqrt(),
        "sqrt_beta_t": beta.sqrt(),
        "alphabar_t": signal,
        "sqrtab": signal.sqrt(),
        "sqrtmab": (1 - signal).sqrt(),
        "mab_over_sqrtmab": (1 - alpha) / (1 - signal).sqrt(),
    }


def written(model: ContextUnet, config: ContextUnetConfig, path: Path, prefix: str = "nn_model.") -> Path:
    """What the published training saves."""
    beta = (config.beta_end - config.beta_start) * torch.arange(config.n_T + 1) / config.n_T
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(tables(beta + config.beta_start) | state, path)
    return path


def same(foreign: Any, model: ContextUnet) -> bool:
    """Whether what was read is the network, and computes what it does."""
    loaded = ContextUnet(foreign.model.config, foreign.info).eval()
    loaded.load_state_dict(dict(foreign.state_dict))
    sigma, y = model.sigmas[[0, -1]].float(), torch.tensor([1, model.null_label])
    x = torch.randn(2, *model.shape)
    with torch.no_grad():
        return torch.equal(loaded.denoise(x, sigma, y), model.denoise(x, sigma, y))


@pytest.mark.parametrize("prefix", ["nn_model.", "module.nn_model.", "nn_model._orig_mod."])
def test_a_file_of_the_published_training_is_read(prefix: str, tmp_path: Path) -> None:
    model = network()
    foreign = read_context(written(model, TINY, tmp_path / "model_49.pth", prefix))
    assert foreign is not None
    assert foreign.model.name == "zeroshot/context-unet"
    assert foreign.model.config == TINY
    assert foreign.info == DIGITS
    assert foreign.note == SIGN
    assert same(foreign, model)


@pytest.mark.parametrize(
    ("config", "info"),
    [
        (ContextUnetConfig(n_feat=16), DIGITS),
        (replace(TINY, beta_start=1e-3, beta_end=0.3), replace(DIGITS, shape=(3, 16, 24), num_classes=4)),
    ],
)
def test_sizes_and_levels_are_read_off(config: ContextUnetConfig, info: DataInfo, tmp_path: Path) -> None:
    model = network(config, info)
    foreign = read_context(written(model, config, tmp_path / "other.pth"))
    assert foreign is not None
    assert (foreign.model.config, foreign.info) == (config, info)
    assert same(foreign, model)


def test_the_network_alone_will_do(tmp_path: Path) -> None:
    config = replace(TINY, n_T=400)
    model = network(config)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    foreign = read_context(tmp_path / "net.safetensors")
    assert foreign is not None
    assert foreign.model.config == config
    assert "noise schedule, taken for 400 levels, beta from 0.0001 to 0.02" in foreign.note
    assert same(foreign, model)
    told = ("model.n_T=30", "model.beta_start=0.0001", "model.beta_end=0.02", "model.sign=-1")
    foreign = read_context(tmp_path / "net.safetensors", told)
    assert foreign is not None
    assert foreign.model.config == TINY
    assert not foreign.note


def test_what_the_file_does_not_tell_can_be_told(tmp_path: Path) -> None:
    path = written(network(), TINY, tmp_path / "model.pth")
    foreign = read_context(path, ("model.sign=1", "data.name=digits", "data.dequantise=true"))
    assert foreign is not None
    assert foreign.model.config == replace(TINY, sign=1)
    assert foreign.info == replace(DIGITS, name="digits", dequantise=True)
    assert not foreign.note
    for told in ("model.colour=red", "model.sign=0", "train.lr=1"):
        with pytest.raises(UserError, match=told.partition("=")[0].partition(".")[0]):
            read_context(path, (told,))


def test_another_schedule_is_refused(tmp_path: Path) -> None:
    state = {f"nn_model.{name}": tensor for name, tensor in network().state_dict().items()}
    torch.save(tables(torch.linspace(0.01, 0.14, 31) ** 2) | state, tmp_path / "model.pth")
    with pytest.raises(UserError, match="not linear in beta"):
        read_context(tmp_path / "model.pth")


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], {"nn_model.out.3.weight": torch.zeros(1, 1, 3, 3)}, {"model": {}}, {3: torch.zeros(1)}],
)
def test_other_files_are_not_ours(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert read_context(tmp_path / "other.pth") is None


class Payload:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save(network().state_dict() | {"extra": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="nothing in it was run"):
        read_context(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
