"""Our weights in the library diffusers, and back: what it computes with them is what we do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cdm_core import formats
from cdm_core.commands.common import Session
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.formats import Foreign
from cdm_core.manager import Registry
from cdm_core.settings import Selection
from cdm_core.testing.conformance import normal, randomise
from cdm_plugins_guidance import plugin
from cdm_plugins_guidance.adm import ADM
from cdm_plugins_guidance.adm_configs import UNetConfig
from cdm_plugins_guidance.diffusers_configs import UNet2DConfig
from cdm_plugins_guidance.diffusers_export import DIT_WARNING, EXPORTS, command, write_folder
from cdm_plugins_guidance.diffusers_weights import (
    Packing,
    adm_from_diffusers,
    adm_to_diffusers,
    dit_to_diffusers,
    edm_to_diffusers,
    packed,
    unpacked,
)
from cdm_plugins_guidance.dit import DiT
from cdm_plugins_guidance.dit_checkpoint import read_dit
from cdm_plugins_guidance.dit_configs import DiTConfig
from cdm_plugins_guidance.edm import EDM
from cdm_plugins_guidance.edm_configs import EDMConfig

IMAGES = DataInfo("images", (3, 16, 16), 7)
ADM_TINY = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=2,
    attention_resolutions=(2, 4),
    num_head_channels=16,
    use_new_attention_order=False,
    class_cond=True,
    dropout=0.0,
    noise_schedule="linear",
)
EDM_TINY = EDMConfig(
    conditional=True,
    model_channels=128,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(8,),
    dropout=0.0,
)


def adm(config: UNetConfig) -> ADM:
    torch.manual_seed(0)
    model = ADM(config, IMAGES).eval()
    randomise(model)
    return model


def converted(model: ADM, config: UNetConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return adm_to_diffusers(
        model.state_dict(),
        image_size=16,
        layers=config.num_res_blocks,
        num_heads=config.num_heads,
        head_channels=None if config.num_head_channels == -1 else config.num_head_channels,
        legacy=not config.use_new_attention_order,
    )


def test_packings_unfold_as_published() -> None:
    """Row r of a packed layer belongs to part, head and channel by the order of the packing's name."""
    heads, d = 2, 3
    rows = torch.arange(3 * heads * d)
    for packing in ("3Hd", "H3d", "Hd3"):
        for part, found in enumerate(unpacked(rows, heads, packing)):
            for head in range(heads):
                for channel in range(d):
                    row = {
                        "3Hd": (part * heads + head) * d + channel,
                        "H3d": (head * 3 + part) * d + channel,
                        "Hd3": (head * d + channel) * 3 + part,
                    }[packing]
                    assert found[head * d + channel] == row


@pytest.mark.parametrize("packing", ["3Hd", "H3d", "Hd3"])
def test_packing_undoes_unpacking(packing: Packing) -> None:
    weight = normal(24, 5)
    assert torch.equal(packed(unpacked(weight, 4, packing), 4, packing), weight)


ADMS = {
    "legacy": {},
    "new order": {"use_new_attention_order": True},
    "heads by number": {"num_head_channels": -1, "num_heads": 4, "attention_resolutions": (1, 2, 4)},
    "additive, resampled by convolutions": {"use_scale_shift_norm": False, "resblock_updown": False},
    "no classes, one level": {"class_cond": False, "channel_mult": (1,), "attention_resolutions": ()},
    "fixed variance, cosine": {"learn_sigma": False, "noise_schedule": "cosine"},
}


@pytest.mark.parametrize("changes", ADMS.values(), ids=ADMS)
def test_adm_comes_back_as_it_was(changes: dict[str, Any]) -> None:
    config = replace(ADM_TINY, **changes)
    model = adm(config)
    settings, weights = converted(model, config)
    heads = config.num_heads if config.num_head_channels == -1 else None
    back = adm_from_diffusers(settings, weights, num_heads=heads, legacy=not config.use_new_attention_order)
    state = model.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("changes", ADMS.values(), ids=ADMS)
@torch.no_grad()
def test_adm_is_the_network_of_the_library(changes: dict[str, Any]) -> None:
    """Heads by number, at several widths, by the setting that the library lacks."""
    pytest.importorskip("diffusers", reason="the library diffusers is not installed")
    from cdm_plugins_guidance.diffusers_models import UNet2D

    config = replace(ADM_TINY, **changes)
    model = adm(config)
    settings, weights = converted(model, config)
    heads = config.num_heads if config.num_head_channels == -1 else None
    other = UNet2D(UNet2DConfig(json.dumps(settings), num_heads=heads), IMAGES).eval()
    other.net.load_state_dict(weights)
    x, t = normal(2, 3, 16, 16), torch.tensor([0, 700])
    y = torch.tensor([2, 6]) if config.class_cond else None
    expected = model(x, t, y)
    assert (other(x, t, y) - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
def test_edm_is_the_network_of_the_library() -> None:
    pytest.importorskip("diffusers", reason="the library diffusers is not installed")
    from cdm_plugins_guidance.diffusers_models import UNet2D

    torch.manual_seed(0)
    model = EDM(EDM_TINY, IMAGES).eval()
    randomise(model)
    settings, weights = edm_to_diffusers(model.state_dict(), image_size=16)
    other = UNet2D(UNet2DConfig(json.dumps(settings), schedule="edm"), IMAGES).eval()
    other.net.load_state_dict(weights)
    sigma, y = torch.tensor([0.01, 1.0, 50.0]), torch.tensor([0, 3, 6])
    x = sigma[:, None, None, None] * normal(3, 3, 16, 16)
    expected = model.denoise(x, sigma, y)
    assert (other.denoise(x, sigma, y) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_what_the_library_cannot_be_is_refused() -> None:
    config = replace(ADM_TINY, channel_mult=(2, 1, 2))
    with pytest.raises(UserError, match="as many time features as its first level has channels, 64"):
        converted(adm(config), config)
    torch.manual_seed(0)
    narrow = replace(EDM_TINY, model_channels=64)
    with pytest.raises(UserError, match="32 groups in every norm, EDM 16 in that of 64"):
        edm_to_diffusers(EDM(narrow, IMAGES).state_dict(), image_size=16)
    with pytest.raises(UserError, match="not the weights of a DhariwalUNet for images of 32"):
        edm_to_diffusers(EDM(EDM_TINY, IMAGES).state_dict(), image_size=32)
    for changes, message in (
        ({"null_class": False}, "one for no class"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 4"),
    ):
        own = replace(DiTConfig.small(), **changes)
        with pytest.raises(UserError, match=message):
            dit_to_diffusers(DiT(own, IMAGES).state_dict(), own)
    settings, weights = converted(adm(ADM_TINY), ADM_TINY)
    with pytest.raises(UserError, match=r"other time features: \{'freq_shift': 1\}"):
        adm_from_diffusers({**settings, "freq_shift": 1}, weights)
    del weights["mid_block.attentions.0.to_k.bias"]
    with pytest.raises(UserError, match=r"lack mid_block\.attentions\.0\.to_k\.bias"):
        adm_from_diffusers(settings, weights)


# -- folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("guidance/dit", DiTConfig(depth=2, hidden_size=16, num_heads=2, noise_steps=50)),
        ("guidance/adm", ADM_TINY),
        ("guidance/adm", replace(ADM_TINY, noise_schedule="cosine", diffusion_steps=50, predicts="v")),
        ("guidance/edm", EDM_TINY),
    ],
)
@torch.no_grad()
def test_a_written_folder_denoises_as_the_model(name: str, config: Any, tmp_path: Path) -> None:
    """Weights, architecture and noise levels: what is read back predicts the same x0 at the same sigma."""
    pytest.importorskip("diffusers", reason="the library diffusers is not installed")
    from cdm_plugins_guidance.diffusers_models import Transformer2D, UNet2D, read_folder

    torch.manual_seed(0)
    made: Any = {"guidance/dit": DiT, "guidance/adm": ADM, "guidance/edm": EDM}[name]
    model = made(config, IMAGES).eval()
    randomise(model)
    write_folder(EXPORTS[name](config, IMAGES, model.state_dict()), tmp_path / "folder")
    foreign = read_folder(tmp_path / "folder")
    assert foreign is not None
    target: Any = Transformer2D if name == "guidance/dit" else UNet2D
    other = target(foreign.model.config, foreign.info).eval()
    other.load_state_dict(dict(foreign.state_dict))
    sigma = model.sigmas[[0, 20, -1]].float() if hasattr(model, "sigmas") else torch.tensor([0.01, 1.0, 70.0])
    x, y = sigma[:, None, None, None] * normal(3, 3, 16, 16), torch.tensor([0, 3, 6])
    expected = model.denoise(x, sigma, y)
    assert (other.denoise(x, sigma, y) - expected).abs().max() <= 5e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "guidance/adm",
            replace(ADM_TINY, num_head_channels=-1, attention_resolutions=(1, 2)),
            "4 heads at several widths",
        ),
        ("guidance/adm", replace(ADM_TINY, num_heads_upsample=2), "as many heads on the way up"),
        (
            "guidance/adm",
            replace(ADM_TINY, resblock_updown=False, conv_resample=False),
            "not without weights",
        ),
        ("guidance/edm", replace(EDM_TINY, precond="vp"), "DhariwalUNet with its own preconditioning"),
    ],
)
def test_a_model_that_a_folder_cannot_describe_is_refused(name: str, config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EXPORTS[name](config, IMAGES, {})


def session() -> Session:
    """What the command is told, with this plugin in memory."""
    made = Session()
    made.registry = Registry.of({"guidance": plugin})
    return made


def test_the_command_writes_a_converted_file_as_a_folder(tmp_path: Path) -> None:
    config = DiTConfig(depth=2, hidden_size=16, num_heads=2)
    info = replace(IMAGES, levels=None, dequantise=False, name="converted")
    torch.manual_seed(0)
    model = DiT(config, info)
    randomise(model)
    src, out = tmp_path / "dit.safetensors", tmp_path / "folder"
    formats.save_converted(Foreign(model.state_dict(), Selection("guidance/dit", config), info), src)
    result = CliRunner().invoke(command, [str(src), "--out", str(out)], obj=session(), catch_exceptions=False)
    assert result.exit_code == 0
    assert f"{out}: DiTTransformer2DModel, DDPMScheduler" in result.output
    assert DIT_WARNING in result.output
    foreign = read_dit(out)
    assert foreign is not None
    assert (foreign.model.config, foreign.info.shape) == (config, info.shape)
    assert all(torch.equal(foreign.state_dict[name], t) for name, t in model.state_dict().items())
    with pytest.raises(UserError, match="exists: choose another name"):
        CliRunner().invoke(command, [str(src), "--out", str(out)], obj=session(), catch_exceptions=False)
