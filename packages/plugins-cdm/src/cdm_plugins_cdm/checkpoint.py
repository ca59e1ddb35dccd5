"""Checkpoints of the official implementation (github.com/shaharYadin/CDM), read for `cdm-run convert`.

A training checkpoint is a dictionary with the averaged weights under `ema_model_state_dict`, their names
with a prefix `module.`; a bare state dict will do. The architecture is read off the shapes. What shapes do
not tell is guessed as published and can be set: the path of noise levels (`--set model.path=...`) and the
size of the images, which decides at which resolution the attention is (`--set data.shape=[C,H,W]`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.formats import Foreign, filled, overridden, read_tensors
from cdm_core.settings import Selection
from cdm_plugins_cdm.configs import UNetConfig

# Levels that a path of T steps has beside them: clean data and pure noise, or fewer.
EXTRA_LEVELS = {"linear": 2, "cosine": 2, "uniform": 2, "ot": 1, "ot_official": 0}
PUBLISHED_ATTENTION = 16  # the height at which every published net has its attention


def read_official(path: Path, overrides: Sequence[str]) -> Foreign | None:
    """The checkpoint in `path`; None when it is something else. UserError on a damaged file."""
    state = _weights(read_tensors(path))
    if state is None:
        return None
    model = _architecture(state)
    shape = _image_shape(state)
    guess = {"model": model, "data": {"name": "converted", "shape": shape, "dequantise": False, "flip": True}}
    if "label_emb.weight" in state:
        guess["data"]["num_classes"] = len(state["label_emb.weight"]) - 1
    values = overridden(guess, overrides)
    info = filled(DataInfo, values["data"], "data", "--set")
    levels = len(state["linear_layer.weight"])
    settings = values["model"]
    extra = EXTRA_LEVELS.get(str(settings["path"]), 0)
    settings = {
        "noise_steps": levels - extra,
        "attn_resolutions": _attention(state, info.shape[1]),
        **settings,
    }
    config = filled(UNetConfig, settings, "model", "--set")
    if config.noise_steps + extra != levels:
        raise UserError(
            f"{path} has {levels} noise levels; model.noise_steps={config.noise_steps} makes {extra} more"
        )
    note = f"Taken from shapes and as published: path {config.path}, images {'x'.join(map(str, info.shape))}."
    return Foreign(state, Selection("cdm/unet", config), info, note)


def _weights(content: Any) -> dict[str, Tensor] | None:
    """The averaged weights without prefix, or None where these are not the official network's."""
    if isinstance(content, Mapping) and isinstance(content.get("ema_model_state_dict"), Mapping):
        content = content["ema_model_state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    state = {str(name).removeprefix("module."): tensor.float() for name, tensor in content.items()}
    wanted = {
        "conv_in.weight": 4,
        "conv_out.weight": 4,
        "linear_layer.weight": 2,
        "mid.block_1.conv1.weight": 4,
    }
    return state if all(name in state and state[name].ndim == n for name, n in wanted.items()) else None


def _indices(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The distinct numbers that the group of `pattern` matches at the start of names, ascending."""
    return sorted({int(match[1]) for name in state if (match := re.match(pattern, name))})


def _architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    channels = len(state["conv_in.weight"])
    stages = _indices(state, r"down\.(\d+)\.")
    widths = [len(state[f"down.{i}.block.0.conv1.weight"]) for i in stages]
    return {
        "channels": channels,
        "ch_mult": [width // channels for width in widths],
        "num_res_blocks": len(_indices(state, r"down\.0\.block\.(\d+)\.")),
        "resamp_with_conv": len(stages) == 1 or "down.0.downsample.conv.weight" in state,
        "decoder": bool(_indices(state, r"up\.(\d+)\.")),
        "conditional": "label_emb.weight" in state,
        "path": "ot_official" if len(state["linear_layer.weight"]) == 1000 else "linear",
    }


def _image_shape(state: Mapping[str, Tensor]) -> list[int]:
    """(C, H, W) such that the attention is where it was published to be; 32x32 without any."""
    attention = _indices(state, r"down\.(\d+)\.attn\.")
    size = PUBLISHED_ATTENTION << attention[0] if attention else 32
    return [state["conv_in.weight"].shape[1], size, size]


def _attention(state: Mapping[str, Tensor], height: int) -> list[int]:
    return [height >> i for i in _indices(state, r"down\.(\d+)\.attn\.")]
