"""Checkpoints of guided-diffusion: settings from shapes, the table of released networks, and `--set`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cdm_core.backbones.adm import EncoderUNet, UNet
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_plugins_guidance.adm import ADM, NoisyClassifier
from cdm_plugins_guidance.adm_checkpoint import LICENCE, read_adm
from cdm_plugins_guidance.adm_configs import (
    PUBLISHED_CLASSIFIERS,
    PUBLISHED_UNETS,
    ClassifierConfig,
    UNetConfig,
)

# The official defaults where shapes tell nothing; attention at height 32, as they are released.
TINY = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_head_channels=-1,
    use_new_attention_order=False,
    dropout=0.0,
    noise_schedule="linear",
)
TINY_CLASSIFIER = ClassifierConfig(
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(2, 4),
    num_head_channels=32,
    noise_schedule="linear",
)


def info(size: int = 64, classes: int | None = 7) -> DataInfo:
    return DataInfo("trained", (3, size, size), classes)


def saved(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_cond": True, "learn_sigma": False},
        {"use_scale_shift_norm": False, "resblock_updown": False},
        {"resblock_updown": False, "conv_resample": False, "num_res_blocks": 2},
        {"channel_mult": (1, 2, 2, 1), "num_res_blocks": 3},
        {"model_channels": 64, "channel_mult": (0.5, 1, 1), "num_res_blocks": 2},
        {"attention_resolutions": (2, 4), "channel_mult": (2, 2, 2)},
        {"channel_mult": (1,), "attention_resolutions": (1,), "resblock_updown": False},
    ],
)
def test_a_network_is_read_off_its_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **changes)
    model = ADM(config, info())
    size = 32 * config.attention_resolutions[0]
    foreign = read_adm(saved(model, tmp_path / "ema_0.9999_000100.pt"), ())
    assert foreign is not None
    assert foreign.model.name == "guidance/adm"
    assert foreign.model.config == config
    assert foreign.info.shape == (3, size, size)
    assert foreign.info.num_classes == (7 if config.class_cond else None)
    assert "guessed" in foreign.note
    ADM(foreign.model.config, foreign.info).load_state_dict(dict(foreign.state_dict))


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@pytest.mark.parametrize("changes", [{}, {"resblock_updown": False, "num_res_blocks": 2}])
def test_a_classifier_is_read_off_its_shapes(tmp_path: Path, pool: Any, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY_CLASSIFIER, pool=pool, **changes)
    foreign = read_adm(saved(NoisyClassifier(config, info()), tmp_path / "model.pt"), ())
    assert foreign is not None
    assert foreign.model.name == "guidance/noisy-classifier"
    assert foreign.model.config == config
    assert foreign.info.num_classes == 7
    assert foreign.info.shape == (3, 64, 64)
    NoisyClassifier(config, foreign.info).load_state_dict(dict(foreign.state_dict))


def test_an_attention_pool_tells_the_image_size(tmp_path: Path) -> None:
    foreign = read_adm(saved(NoisyClassifier(TINY_CLASSIFIER, info(32)), tmp_path / "model.pt"), ())
    assert foreign is not None
    assert foreign.info.shape == (3, 32, 32)


def test_the_converted_network_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ADM(dataclasses.replace(TINY, class_cond=True), info()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    foreign = read_adm(saved(model, tmp_path / "model.pt"), ())
    assert foreign is not None
    loaded = ADM(foreign.model.config, foreign.info).eval()
    loaded.load_state_dict(dict(foreign.state_dict))
    x, sigma, y = torch.randn(2, 3, 64, 64), torch.tensor([0.1, 5.0]), torch.tensor([3, 6])
    with torch.no_grad():
        assert torch.equal(loaded.denoise(x, sigma, y), model.denoise(x, sigma, y))


def test_what_shapes_do_not_tell_can_be_set(tmp_path: Path) -> None:
    path = saved(ADM(dataclasses.replace(TINY, class_cond=True), info()), tmp_path / "model.pt")
    settings = ["model.num_heads=2", "model.noise_schedule=cosine", "data.shape=[3,16,16]"]
    foreign = read_adm(path, [*settings, "model.null_class=true", "model.use_new_attention_order=true"])
    assert foreign is not None
    config = foreign.model.config
    assert (config.num_heads, config.noise_schedule, config.use_new_attention_order) == (2, "cosine", True)
    assert foreign.info.shape == (3, 16, 16)
    assert foreign.info.num_classes == 6  # the seventh means "no class"
    assert "2 heads in the new order, schedule cosine" in foreign.note
    assert "3x16x16" in foreign.note
    assert foreign.note.endswith(f" {LICENCE}")
    assert "MIT" in LICENCE


def test_a_setting_that_contradicts_the_shapes_does_not_load(tmp_path: Path) -> None:
    path = saved(ADM(TINY, info()), tmp_path / "model.pt")
    with pytest.raises(UserError, match="whole heads"):
        read_adm(path, ["model.num_heads=3"])


def network(config: UNetConfig | ClassifierConfig, size: int) -> nn.Module:
    """A released network without its numbers."""
    with torch.device("meta"):
        if isinstance(config, ClassifierConfig):
            return EncoderUNet(config, 3, 1000, size, config.pool)
        return UNet(config, 3, 6, 1000 if config.class_cond else None)


# Millions of parameters, as published.
MILLIONS = {
    "64x64_diffusion": 296,
    "128x128_diffusion": 422,
    "256x256_diffusion": 554,
    "64x64_classifier": 65,
    "128x128_classifier": 43,
    "256x256_classifier": 54,
}


@pytest.mark.parametrize("name", [*PUBLISHED_UNETS, *PUBLISHED_CLASSIFIERS])
def test_a_released_network_is_recognised(tmp_path: Path, name: str) -> None:
    size, settings = {**PUBLISHED_UNETS, **PUBLISHED_CLASSIFIERS}[name]
    config = (ClassifierConfig if name.endswith("classifier") else UNetConfig)(**settings)
    config.check()
    net = network(config, size)
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert round(millions) == MILLIONS.get(name, round(millions))
    # One number, repeated: the file has the shapes and next to no size.
    state = {key: torch.zeros(()).expand(value.shape) for key, value in net.state_dict().items()}
    torch.save(state, tmp_path / "renamed.pt")
    foreign = read_adm(tmp_path / "renamed.pt", ())
    assert foreign is not None
    assert foreign.model.config == config
    assert foreign.info.shape == (3, size, size)
    assert f"taken as released in {name}.pt" in foreign.note


@pytest.mark.parametrize(
    "content",
    [
        {"conv_in.weight": torch.zeros(4, 3, 3, 3)},
        {"state_dict": {}},
        [torch.zeros(1)],
        {},
    ],
)
def test_other_files_are_not_read(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert read_adm(tmp_path / "other.pt", ()) is None


def test_a_network_with_a_head_of_its_own_is_not_read(tmp_path: Path) -> None:
    state = ADM(TINY, info()).state_dict()
    torch.save({**state, "head.weight": torch.zeros(1)}, tmp_path / "other.pt")
    assert read_adm(tmp_path / "other.pt", ()) is None


def test_missing_layers_are_named(tmp_path: Path) -> None:
    state = ADM(TINY, info()).state_dict()
    del state["input_blocks.1.0.out_layers.3.weight"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"without its layer 'input_blocks\.1\.0\.out_layers\.3\.weight'"):
        read_adm(tmp_path / "cut.pt", ())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("out.2.weight", torch.tensor(1.0), r"its out\.2\.weight is of shape \(\)"),
        ("input_blocks.1.0.out_layers.3.weight", torch.tensor(1.0), r"is of shape \(\)"),
        ("time_embed.0.weight", torch.zeros(128, 0), r"its time_embed\.0\.weight is of shape \(128, 0\)"),
        ("out.x\x1b[2J\n", torch.tensor(1.0), r"its out\.x\\x1b\[2J\\n is of shape"),
    ],
)
def test_weights_of_no_size_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    torch.save({**ADM(TINY, info()).state_dict(), name: tensor}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=message) as error:
        read_adm(tmp_path / "bad.pt", ())
    assert str(error.value).isprintable()


def test_a_block_of_an_enormous_number_makes_no_enormous_network(tmp_path: Path) -> None:
    state = ADM(TINY, info()).state_dict()
    torch.save({**state, f"input_blocks.{10**12}.0.bias": torch.zeros(1)}, tmp_path / "far.pt")
    foreign = read_adm(tmp_path / "far.pt", ())
    assert foreign is not None
    assert foreign.model.config == TINY
