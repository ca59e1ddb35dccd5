"""Official training checkpoints: configuration from shapes, weights, and what can be told to `convert`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cdm_core import formats
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.manager import load_registry
from cdm_plugins_cdm.checkpoint import read_official
from cdm_plugins_cdm.configs import UNetConfig
from cdm_plugins_cdm.unet import UNet

# Attention is at height 16 and norms have 32 groups, as published; all else is unlike the defaults.
TINY = UNetConfig(channels=32, ch_mult=(1, 3), num_res_blocks=1, attn_resolutions=(16,), noise_steps=30)


def official(config: UNetConfig, size: int = 32) -> UNet:
    torch.manual_seed(0)
    model = UNet(config, DataInfo("trained", (3, size, size), 5))
    torch.nn.init.normal_(model.linear_layer.weight)
    return model.eval()


def saved(model: UNet, path: Path) -> Path:
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    plain = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model_state_dict": plain, "ema_model_state_dict": state, "epoch": 7}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 32),
        ({"conditional": True}, 32),
        ({"resamp_with_conv": False, "num_res_blocks": 2}, 32),
        ({"attn_resolutions": (), "ch_mult": (2, 1, 1)}, 32),
        ({"ch_mult": (1, 1, 2)}, 64),
        ({"path": "ot_official", "noise_steps": 1000}, 32),
        ({"decoder": False}, 32),
    ],
)
def test_architecture_is_read_off_the_shapes(tmp_path: Path, changes: dict[str, Any], size: int) -> None:
    config = dataclasses.replace(TINY, **changes)
    if size == 64:
        config = dataclasses.replace(config, attn_resolutions=(16,))
    model = official(config, size)
    foreign = read_official(saved(model, tmp_path / "ckpt.pt"), ())
    assert foreign is not None
    assert foreign.model.name == "cdm/unet"
    assert foreign.model.config == config
    assert foreign.info.shape == (3, size, size)
    assert foreign.info.num_classes == (5 if config.conditional else None)


def test_converted_model_is_the_averaged_one(tmp_path: Path) -> None:
    model = official(TINY)
    foreign = read_official(saved(model, tmp_path / "ckpt.pt"), ())
    assert foreign is not None
    formats.save_converted(foreign, tmp_path / "cdm.safetensors")
    loaded, about = formats.load_converted(tmp_path / "cdm.safetensors", load_registry())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval().log_density(x), model.log_density(x))
    # The official data are scaled to [-1, 1] and not dequantised.
    assert (about.info.dequantise, about.info.levels) == (False, 256)
    assert "path linear" in about.note


def test_what_shapes_do_not_tell_can_be_told(tmp_path: Path) -> None:
    path = saved(official(dataclasses.replace(TINY, path="ot", noise_steps=31)), tmp_path / "ckpt.pt")
    told = ("model.path=ot", "data.shape=[3,48,48]", "data.dequantise=true", "model.dropout=0.2")
    foreign = read_official(path, told)
    assert foreign is not None
    assert foreign.model.config == dataclasses.replace(
        TINY, path="ot", noise_steps=31, attn_resolutions=(24,), dropout=0.2
    )
    assert foreign.info.shape == (3, 48, 48)
    assert foreign.info.dequantise


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("model.path=vp", "model.path"),
        ("model.noise_steps=12", "32 noise levels"),
        ("data.size=64", "data.size"),
        ("train.lr=1", "train"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, told: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_official(saved(official(TINY), tmp_path / "ckpt.pt"), (told,))


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], {"ema_model_state_dict": {"weight": torch.zeros(1)}}, {"conv_in.weight": torch.zeros(3)}],
)
def test_other_files_are_not_ours(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert read_official(tmp_path / "other.pt", ()) is None


def test_half_a_network_is_refused_in_words(tmp_path: Path) -> None:
    state = {
        name: t for name, t in official(TINY).state_dict().items() if not name.startswith("up.0.block.1")
    }
    torch.save(state, tmp_path / "ckpt.pt")
    foreign = read_official(tmp_path / "ckpt.pt", ())
    assert foreign is not None
    with pytest.raises(UserError, match=r"ckpt.pt does not fit the model 'cdm/unet'.*Missing key"):
        formats.build(foreign, load_registry(), "ckpt.pt")
