"""Weights of the released implementation (github.com/KamilDeja/joint_diffusion), read for `cdm-run convert`.

A file is the state dict of its U-Net, the head among it under `clasifier`; with a prefix where it was saved
from within a wrapper. The architecture is read off names and shapes. What those do not tell (heads of
attention, the number of levels, the size of the images, what the classes are) is as published for the
architecture, and the note says so; `--set model.diffusion_steps=500` and the like set it.
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
from cdm_plugins_joint.configs import JointConfig

State = Mapping[str, Tensor]
WANTED = {
    "time_embed.0.weight": 2,
    "input_blocks.0.0.weight": 4,
    "output_blocks.0.0.in_layers.0.weight": 1,
    "out.2.weight": 4,
    "clasifier.bn_1.weight": 1,
    "clasifier.fc_1.weight": 2,
    "clasifier.fc_2.weight": 2,
}
PREFIX = re.compile(r"^(?:module\.|model\.)+")
ATTRIBUTES = 40  # of CelebA, the one published set whose classes are attributes


def read_official(path: Path, overrides: Sequence[str]) -> Foreign | None:
    """The checkpoint in `path`; None when it is something else. UserError on a damaged file."""
    state = _weights(read_tensors(path))
    if state is None:
        return None
    try:
        model = _architecture(state)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path} is no U-Net of joint diffusion: its layers do not fit ({error})") from error
    side = _side(model)
    channels, classes = state["input_blocks.0.0.weight"].shape[1], len(state["clasifier.fc_2.weight"])
    data = {
        "name": "converted",
        "shape": [channels, side, side],
        "num_classes": classes,
        "dequantise": False,
    }
    values = overridden({"model": model, "data": data}, overrides)
    info = filled(DataInfo, values["data"], "data", "--set")
    config = filled(JointConfig, values["model"], "model", "--set")
    return Foreign(state, Selection("joint/unet", config), info, _note(config, info))


def _note(config: JointConfig, info: DataInfo) -> str:
    kind = "attributes" if config.multi_label else "classes"
    return (
        f"Not told by shapes, as published: attention of {config.num_heads} heads, {config.diffusion_steps} "
        f"levels from beta {config.beta_start} on, eps predicted, images {'x'.join(map(str, info.shape))}, "
        f"{info.num_classes} {kind}. The head was trained on clean images: steer it with "
        "adapter.head_level=clean."
    )


def _weights(content: Any) -> dict[str, Tensor] | None:
    """The weights without prefix, or None where these are not the released network's."""
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    state = {PREFIX.sub("", str(name)): tensor for name, tensor in content.items()}
    if any(
        name not in state or state[name].ndim != n or not state[name].numel() for name, n in WANTED.items()
    ):
        return None
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def _indices(state: State, pattern: str) -> list[int]:
    """The distinct numbers that the group of `pattern` matches at the start of names, ascending.

    Of at most four digits each: a file's one name must not make a network of millions of blocks.
    """
    return sorted({int(match[1]) for name in state if (match := re.match(pattern, name))})


def _architecture(state: State) -> dict[str, Any]:
    """The settings that shapes tell, and those that were the same in every published network."""
    blocks = _indices(state, r"input_blocks\.([0-9]{1,4})\.")
    residual = _indices(state, r"input_blocks\.([0-9]{1,4})\.0\.in_layers\.")
    halving = sorted(set(range(1, blocks[-1] + 1)) - set(residual))
    period = halving[0] if halving else blocks[-1] + 1
    first = range(1, blocks[-1] + 1, period)  # the first block of each resolution
    base = state["time_embed.0.weight"].shape[1]
    widths = [len(state[f"input_blocks.{i}.0.out_layers.3.weight"]) for i in first]
    attended = [f"input_blocks.{i}.1.qkv.weight" in state for i in first]
    channels, outputs = state["input_blocks.0.0.weight"].shape[1], len(state["out.2.weight"])
    return {
        "model_channels": base,
        "channel_mult": tuple(width // base if width % base == 0 else width / base for width in widths),
        "num_res_blocks": period - 1,
        "attention_resolutions": tuple(2**level for level, there in enumerate(attended) if there),
        "use_scale_shift_norm": len(state["input_blocks.1.0.emb_layers.1.weight"]) == 2 * widths[0],
        "conv_resample": not halving or f"input_blocks.{halving[0]}.0.op.weight" in state,
        "learn_sigma": outputs == 2 * channels,
        "head": "official",
        "multi_label": len(state["clasifier.fc_2.weight"]) == ATTRIBUTES,
    }


def _side(model: Mapping[str, Any]) -> int:
    """Height of the images: published attention is at 16 and below, or at the full resolution of 28."""
    first = min(model["attention_resolutions"], default=2)
    return 28 if first == 1 else 16 * first
