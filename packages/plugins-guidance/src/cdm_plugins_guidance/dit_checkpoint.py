"""Checkpoints of the official DiT (github.com/facebookresearch/DiT), read for `cdm-run convert`.

A released file is a bare state dict; a training checkpoint has the averaged weights under `ema`, beside
`model`, `opt` and `args`, an `argparse.Namespace`: that class, which only holds values, is let in, no other.
A folder of diffusers with the same weights will do too. Sizes are read off the shapes. What shapes do not
tell can be set: the number of heads of an unpublished width (`--set model.num_heads=...`), and the size of
images that are not square (`--set data.shape=[C,H,W]`).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.diffusers_folder import Folder, find
from cdm_core.diffusers_models import data_settings, model_settings
from cdm_core.formats import Foreign, filled, overridden, read_tensors
from cdm_core.settings import Selection
from cdm_plugins_guidance.adm_checkpoint import check_shapes
from cdm_plugins_guidance.diffusers_models import TRANSFORMERS
from cdm_plugins_guidance.diffusers_weights import dit_from_diffusers
from cdm_plugins_guidance.dit import position_table
from cdm_plugins_guidance.dit_configs import SIZES, DiTConfig, Shape

HEAD = 64  # channels of a head where the width is none of the published ones
LICENCE = "The released DiT weights are licensed CC BY-NC 4.0: for non-commercial use."
RELEASED = (SIZES["XL"], 2, 1000)  # shape, patch and classes of both released nets, of 256 and 512 pixels

# A tensor of every DiT and its number of axes, by which one is known.
MARKS = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.bias": 1,
    "final_layer.linear.bias": 1,
}


def read_dit(path: Path, overrides: Sequence[str] = ()) -> Foreign | None:
    """The checkpoint in `path`; None when it is something else. UserError on a damaged file."""
    if path.is_dir() or path.suffix == ".json":
        folder = find(path, TRANSFORMERS)
        return None if folder is None else _from_folder(folder, overrides)
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = _weights(read_tensors(path))
    if state is None:
        return None
    check_shapes(state, path)
    foreign = _foreign(state, _architecture(state), _data(state), overrides)
    shape = foreign.model.config.shape
    if shape in SIZES.values() or any(text.startswith("model.num_heads=") for text in overrides):
        return foreign
    guess = (
        f"Shapes do not tell the number of attention heads, taken for {shape.num_heads}: set model.num_heads."
    )
    return replace(foreign, note=f"{guess} {foreign.note}".strip())


def _foreign(
    state: dict[str, Tensor],
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    overrides: Sequence[str],
    note: str = "",
) -> Foreign:
    guess = {name: value for name, value in data.items() if name != "num_classes"}
    values = overridden({"model": model, "data": guess}, overrides)
    classes = _rows(state) - bool(values["model"].get("null_class", DiTConfig.null_class))
    labels = {"num_classes": classes} if classes > 0 else {}
    config = filled(DiTConfig, values["model"], "model", "--set")
    info = filled(DataInfo, labels | values["data"], "data", "--set")
    if (config.shape, config.patch_size, info.num_classes) == RELEASED:
        note = f"{note} {LICENCE}".strip()
    return Foreign(state, Selection("guidance/dit", config), info, note)


def _weights(content: Any) -> dict[str, Tensor] | None:
    """The averaged weights, float32, or None where these are not a DiT's."""
    if isinstance(content, Mapping) and isinstance(content.get("ema"), Mapping):
        content = content["ema"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    state = {str(name).removeprefix("module."): tensor.float() for name, tensor in content.items()}
    return state if all(name in state and state[name].ndim == n for name, n in MARKS.items()) else None


def _architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    depth = len({match[1] for name in state if (match := re.match(r"blocks\.([0-9]+)\.", name))})
    outputs = len(state["final_layer.linear.bias"])
    return {
        **_size(depth, width),
        "patch_size": patch,
        "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / width,
        "learn_sigma": outputs == 2 * channels * patch**2,
    }


def _size(depth: int, width: int) -> dict[str, Any]:
    """The published size of that depth and width by name, or the two with a guess of the heads."""
    for name, shape in SIZES.items():
        if shape[:2] == (depth, width):
            return {"size": name}
    heads = {shape.hidden_size: shape.num_heads for shape in SIZES.values()}
    guess = Shape(depth, width, heads.get(width, max(1, width // HEAD)))
    return guess._asdict()


def _data(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Latents of square images where the channels are not those of pixels."""
    _, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    side = patch * round(state["pos_embed"].shape[1] ** 0.5)
    data: dict[str, Any] = {"name": "converted", "shape": [channels, side, side], "dequantise": False}
    if channels not in (1, 3):
        data["levels"] = "none"
    return data


def _rows(state: Mapping[str, Tensor]) -> int:
    """Classes that the network knows, the one for "no class" among them; 0 without."""
    table = state.get("y_embedder.embedding_table.weight")
    return 0 if table is None else len(table)


def _from_folder(folder: Folder, overrides: Sequence[str]) -> Foreign | None:
    """A DiT in a folder of diffusers as our own; None where it is one that only diffusers computes."""
    settings, noise = folder.settings, model_settings(folder)
    if settings.get("norm_type", "ada_norm_zero") != "ada_norm_zero" or noise.pop("zero_snr"):
        return None
    if noise.pop("schedule") != "linear" or noise.pop("prediction") != "epsilon":
        return None
    state = dit_from_diffusers(settings, folder.weights())
    if state is None:
        return None
    del noise["architecture"]
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    model = {**_architecture(state), **noise}
    if "size" not in model:
        model["num_heads"] = settings["num_attention_heads"]
    data = data_settings(folder)
    rows, columns = (side // settings["patch_size"] for side in data["shape"][1:])
    state["pos_embed"] = position_table(rows, columns, width)[None]
    return _foreign(
        state, model, data, overrides, "Read as the official DiT computes, not as diffusers does."
    )
