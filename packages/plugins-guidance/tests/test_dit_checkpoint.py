"""Official DiT checkpoints: sizes from shapes, the averaged weights, and nothing run that a file brings."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cdm_core import formats
from cdm_core.config import plain
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_plugins_guidance.diffusers_weights import dit_to_diffusers
from cdm_plugins_guidance.dit import DiT
from cdm_plugins_guidance.dit_checkpoint import LICENCE, read_dit
from cdm_plugins_guidance.dit_configs import DiTConfig

LATENTS = DataInfo("converted", (4, 8, 8), num_classes=5, levels=None, dequantise=False)
TINY = DiTConfig(depth=2, hidden_size=128, num_heads=2)


def official(config: DiTConfig = TINY, info: DataInfo = LATENTS) -> DiT:
    torch.manual_seed(0)
    model = DiT(config, info)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def trained(model: DiT, path: Path) -> Path:
    """What official training writes: other weights under `model`, the optimiser's, and the arguments."""
    state = model.state_dict()
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, results_dir="results", num_classes=1000)
    plain = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    opt = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save({"model": plain, "ema": state, "opt": opt, "args": args}, path)
    return path


def released(model: DiT, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("write", [trained, released])
def test_converted_weights_are_the_averaged_ones(write: Any, tmp_path: Path) -> None:
    model = official()
    foreign = read_dit(write(model, tmp_path / "0050000.pt"))
    assert foreign is not None
    assert foreign.model.name == "guidance/dit"
    assert foreign.info == LATENTS
    loaded = DiT(foreign.model.config, foreign.info).eval()
    loaded.load_state_dict(dict(foreign.state_dict))
    x, sigma, y = torch.randn(2, 4, 8, 8), model.sigmas[[3, 900]].float(), torch.tensor([0, 5])
    with torch.no_grad():
        assert torch.equal(loaded.denoise(x, sigma, y), model.denoise(x, sigma, y))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (TINY, (4, 8, 8)),
        (replace(TINY, patch_size=4, depth=1, hidden_size=192, num_heads=3), (4, 16, 16)),
        (replace(TINY, mlp_ratio=2.5, learn_sigma=False), (3, 8, 8)),
    ],
)
def test_sizes_are_read_off_the_shapes(config: DiTConfig, shape: Any, tmp_path: Path) -> None:
    info = DataInfo("trained", shape, 7, levels=None)
    foreign = read_dit(released(official(config, info), tmp_path / "dit.pt"))
    assert foreign is not None
    assert foreign.model.config == config
    assert (foreign.info.shape, foreign.info.num_classes) == (shape, 7)
    assert foreign.info.levels == (256 if shape[0] == 3 else None)
    assert f"attention heads, taken for {config.num_heads}" in foreign.note


def test_a_published_size_is_known_by_name(tmp_path: Path) -> None:
    """The released net's shapes, without its gigabytes: stored as one number each."""
    with torch.device("meta"):
        model = DiT(DiTConfig("XL"), DataInfo("latents", (4, 32, 32), 1000, levels=None))
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "DiT-XL-2-256x256.pt")
    foreign = read_dit(tmp_path / "DiT-XL-2-256x256.pt")
    assert foreign is not None
    assert foreign.model.config == DiTConfig("XL")
    assert (foreign.info.shape, foreign.info.num_classes) == ((4, 32, 32), 1000)
    assert foreign.note == LICENCE


def test_what_shapes_do_not_tell_can_be_told(tmp_path: Path) -> None:
    told = ("model.num_heads=8", "data.shape=[4,4,16]", "model.cfg_channels=none")
    foreign = read_dit(released(official(), tmp_path / "dit.pt"), told)
    assert foreign is not None
    assert foreign.model.config == replace(TINY, num_heads=8, cfg_channels=None)
    assert foreign.info.shape == (4, 4, 16)
    assert not foreign.note


def test_without_a_class_for_none_every_row_is_a_class(tmp_path: Path) -> None:
    config = replace(TINY, null_class=False)
    model = official(config)
    path = released(model, tmp_path / "dit.pt")
    foreign = read_dit(path, ("model.null_class=false",))
    assert foreign is not None
    assert (foreign.model.config, foreign.info.num_classes) == (config, 5)
    DiT(config, foreign.info).load_state_dict(dict(foreign.state_dict))
    assert read_dit(path).info.num_classes == 4  # type: ignore[union-attr]
    assert read_dit(path, ("data.num_classes=3",)).info.num_classes == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(), (0, 128)])
def test_weights_of_no_size_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    name = "y_embedder.embedding_table.weight"
    torch.save({**official().state_dict(), name: torch.zeros(shape)}, tmp_path / "dit.pt")
    with pytest.raises(UserError, match=r"its y_embedder\.embedding_table\.weight is of shape \("):
        read_dit(tmp_path / "dit.pt")


@pytest.mark.parametrize("told", ["model.num_heads=3", "model.colour=red", "train.lr=1"])
def test_what_cannot_be_told_is_refused(told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told.partition("=")[0].partition(".")[0]):
        read_dit(released(official(), tmp_path / "dit.pt"), (told,))


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], {"ema": {"weight": torch.zeros(1)}}, {"pos_embed": torch.zeros(1, 4, 8)}, {"ema": 3}],
)
def test_other_files_are_not_ours(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert read_dit(tmp_path / "other.pt") is None


class Payload:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Disguise(argparse.Namespace):
    """A class of its own is not let in with its parent."""


@pytest.mark.parametrize("place", ["value", "state", "subclass"])
def test_nothing_in_a_file_is_run(place: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = Payload(marker)
    args = {
        "value": payload,
        "state": argparse.Namespace(model=payload),
        "subclass": Disguise(model="DiT-XL/2"),
    }[place]
    torch.save({"ema": official().state_dict(), "args": args}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="nothing in it was run"):
        read_dit(tmp_path / "evil.pt")
    assert not marker.exists()


def test_a_namespace_is_let_in_for_this_file_alone(tmp_path: Path) -> None:
    path = trained(official(), tmp_path / "dit.pt")
    assert read_dit(path) is not None
    with pytest.raises(UserError, match="holds more than tensors"):
        formats.read_tensors(path)


# -- folders of diffusers: no library is needed to read one --------------------------------------------------


def folder(model: DiT, root: Path, config: DiTConfig = TINY, scheduler: Any = None) -> Path:
    """A pipeline's folder with the network's weights, as diffusers writes it."""
    settings, weights = dit_to_diffusers(model.state_dict(), config)
    for name in ("transformer", "scheduler"):
        (root / name).mkdir(parents=True)
    safetensors.torch.save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()},
        root / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    table = {"_class_name": "DiTTransformer2DModel", "norm_type": "ada_norm_zero", **settings}
    (root / "transformer" / "config.json").write_text(json.dumps(table))
    index = {"_class_name": "DiTPipeline", "id2label": {str(i): f"class {i}" for i in range(5)}}
    (root / "model_index.json").write_text(json.dumps(index))
    noise = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler or noise))
    return root


@pytest.mark.parametrize("name", ["", "model_index.json", "transformer/config.json"])
def test_a_folder_of_diffusers_is_the_same_network(name: str, tmp_path: Path) -> None:
    config = replace(TINY, num_heads=4)
    model = official(config)
    foreign = read_dit(folder(model, tmp_path / "dit", config) / name)
    assert foreign is not None
    assert foreign.model.config == config
    assert foreign.info == replace(LATENTS, class_names=tuple(f"class {i}" for i in range(5)))
    assert "heads" not in foreign.note
    state = model.state_dict()
    assert foreign.state_dict.keys() == state.keys()
    assert all(torch.equal(foreign.state_dict[key], state[key]) for key in state)


def test_a_network_that_only_diffusers_computes_is_left_to_it(tmp_path: Path) -> None:
    root = folder(official(), tmp_path / "dit")
    path = root / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"] += 1
    safetensors.torch.save_file(weights, path)
    assert read_dit(root) is None
    noise = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    assert read_dit(folder(official(), tmp_path / "other", scheduler=noise)) is None


def test_half_a_folder_is_refused_in_words(tmp_path: Path) -> None:
    root = folder(official(), tmp_path / "dit")
    path = root / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["transformer_blocks.1.attn1.to_v.bias"]
    safetensors.torch.save_file(weights, path)
    with pytest.raises(UserError, match=r"lack transformer_blocks\.1\.attn1\.to_v\.bias"):
        read_dit(root)
    path.unlink()
    with pytest.raises(UserError, match="has no weights: expected one of diffusion_pytorch_model"):
        read_dit(root)
    (root / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match=r"has no scheduler_config\.json"):
        read_dit(root)


def test_its_settings_survive_the_way_through_a_file() -> None:
    config = replace(TINY, cfg_channels=None, latent_scale=0.5)
    again = formats.filled(DiTConfig, json.loads(json.dumps(plain(config))), "model", "file")
    assert again == config
