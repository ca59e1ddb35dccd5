"""Checkpoints of guided-diffusion (github.com/openai/guided-diffusion), read for `cdm-run convert`.

A file is a flat state dict: the released ones, and what its training writes, averaged (`ema_...pt`) or
not. The architecture is read off names and shapes. What those do not tell (heads of attention, the order
of q, k and v, the noise schedule, mostly the image size) is taken from the released network whose
architecture it is; else it is guessed, and the note says so. `--set model.num_heads=...`, `--set
data.shape=[C,H,W]` and the like set it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.formats import Foreign, filled, overridden, read_tensors
from cdm_core.settings import Selection
from cdm_plugins_guidance.adm_configs import (
    PUBLISHED_CLASSIFIERS,
    PUBLISHED_UNETS,
    ClassifierConfig,
    UNetConfig,
)
from cdm_plugins_guidance.pickles import shown

LICENCE = "The released networks of github.com/openai/guided-diffusion are under the MIT licence."
State = Mapping[str, Tensor]
PARTS = re.compile(r"(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\.")
WANTED = {"time_embed.0.weight": 2, "input_blocks.0.0.weight": 4, "middle_block.1.qkv.weight": 3}
# Pool of a classifier by the first of these names that it has.
POOLS = {
    "out.2.positional_embedding": "attention",
    "out.3.bias": "spatial_v2",
    "out.2.bias": "spatial",
}


class Guess(NamedTuple):
    """What shapes and the table of released networks make of a file."""

    model: dict[str, Any]
    image_size: int
    origin: str  # where from is what the shapes do not tell


def read_adm(path: Path, overrides: Sequence[str]) -> Foreign | None:
    """The checkpoint in `path`; None when it is something else. UserError on a damaged file."""
    state = _weights(read_tensors(path))
    if state is None:
        return None
    check_shapes(state, path)
    unet = any(name.startswith("output_blocks.") for name in state)
    size = None
    try:
        seen = _architecture(state) | (_head_of_unet(state) if unet else _head_of_classifier(state))
        rows = _labels(state, unet)
    except KeyError as error:
        raise UserError(f"{path} is a network of guided-diffusion without its layer {error}") from error
    if "out.2.positional_embedding" in state:
        places = state["out.2.positional_embedding"].shape[-1] - 1
        size = math.isqrt(places) << (len(seen["channel_mult"]) - 1)
    guess = _completed(seen, unet, size)
    channels = state["input_blocks.0.0.weight"].shape[1]
    data = {
        "name": "converted",
        "shape": [channels, guess.image_size, guess.image_size],
        "dequantise": False,
        "flip": True,
    }
    values = overridden({"model": guess.model, "data": data}, overrides)
    classes = rows - bool(values["model"].get("null_class"))
    labels = {"num_classes": classes} if classes else {}
    info = filled(DataInfo, labels | values["data"], "data", "--set")
    config = filled(UNetConfig if unet else ClassifierConfig, values["model"], "model", "--set")
    name = "guidance/adm" if unet else "guidance/noisy-classifier"
    return Foreign(state, Selection(name, config), info, _note(config, info, guess.origin))


def _note(config: Any, info: DataInfo, origin: str) -> str:
    heads = (
        f"{config.num_heads} heads"
        if config.num_head_channels == -1
        else f"heads of {config.num_head_channels}"
    )
    order = "new" if config.use_new_attention_order else "legacy"
    return (
        f"Not told by shapes, {origin}: attention of {heads} in the {order} order, schedule "
        f"{config.noise_schedule} of {config.diffusion_steps} steps, images {'x'.join(map(str, info.shape))}."
        f" {LICENCE}"
    )


def check_shapes(state: State, path: Path) -> None:
    """UserError on a weight that is a single number or none at all, which no layer has."""
    for name, tensor in state.items():
        if not tensor.ndim or not tensor.numel():
            raise UserError(f"{path} is damaged: its {shown(name)} is of shape {tuple(tensor.shape)}")


def _weights(content: Any) -> dict[str, Tensor] | None:
    """The weights in float32, or None where these are not the official networks'."""
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    if not all(isinstance(name, str) and PARTS.match(name) for name in content):
        return None
    if any(name not in content or content[name].ndim != n for name, n in WANTED.items()):
        return None
    return {name: tensor.float() for name, tensor in content.items()}


# -- what shapes tell ----------------------------------------------------------------------------------------


def _architecture(state: State) -> dict[str, Any]:
    """The settings of the first half, which both networks have."""
    period, updown = _period(state)
    base = state["time_embed.0.weight"].shape[1]
    first = range(1, _count(state), period)  # the first block of each resolution
    widths = [len(state[f"input_blocks.{i}.0.out_layers.3.weight"]) for i in first]
    mult = [width / base for width in widths]
    strided = any(name.endswith(".0.op.weight") for name in state)
    return {
        "model_channels": base,
        "channel_mult": tuple(int(m) if m == int(m) else m for m in mult),
        "num_res_blocks": period - 1,
        "attention_resolutions": tuple(2**level for level, i in enumerate(first) if _attended(state, i)),
        "use_scale_shift_norm": len(state["input_blocks.1.0.emb_layers.1.weight"]) == 2 * widths[0],
        "resblock_updown": updown,
        "conv_resample": strided or updown or len(widths) == 1,
    }


def _head_of_unet(state: State) -> dict[str, Any]:
    channels, outputs = state["input_blocks.0.0.weight"].shape[1], len(state["out.2.weight"])
    return {"class_cond": "label_emb.weight" in state, "learn_sigma": outputs == 2 * channels}


def _head_of_classifier(state: State) -> dict[str, Any]:
    if "out.3.weight" in state and state["out.3.weight"].ndim == 4:
        return {"pool": "adaptive"}
    return {"pool": POOLS[_first_of(state, POOLS)]}


def _labels(state: State, unet: bool) -> int:
    """Classes that the network knows, the one for "no class" among them; 0 without."""
    if unet:
        return len(state["label_emb.weight"]) if "label_emb.weight" in state else 0
    return len(state[_first_of(state, ("out.2.c_proj.bias", "out.3.bias", "out.2.bias"))])


def _first_of(state: State, names: Iterable[str]) -> str:
    """The first of `names` that the file has; KeyError without any."""
    for name in names:
        if name in state:
            return name
    raise KeyError("out")


def _indices(state: State, pattern: str) -> list[int]:
    """The distinct numbers that the group of `pattern` matches at the start of names, ascending.

    Of at most four digits each: a file's one name must not make a network of millions of blocks.
    """
    return sorted({int(match[1]) for name in state if (match := re.match(pattern, name))})


def _count(state: State) -> int:
    """Members of `input_blocks`; one that averages has no weights and so no name."""
    return _indices(state, r"input_blocks\.([0-9]{1,4})\.")[-1] + 1


def _attended(state: State, i: int) -> bool:
    return f"input_blocks.{i}.1.qkv.weight" in state


def _period(state: State) -> tuple[int, bool]:
    """Blocks a resolution, the one that halves it included; whether that is a residual block.

    It halves in every member of `input_blocks` whose number is a multiple of the period.
    """
    count = _count(state)
    residual = _indices(state, r"input_blocks\.([0-9]{1,4})\.0\.in_layers\.")
    other = sorted(set(range(1, count)) - set(residual))
    if other:
        return other[0], False
    ups = _indices(state, r"output_blocks\.([0-9]{1,4})\.[12]\.in_layers\.")
    if ups:
        return ups[0] + 1, True
    if any(name.startswith("output_blocks.") for name in state):
        return count, False  # a single resolution
    fitting = [n for n in range(2, count + 1) if count % n == 0 and _fits(state, count, n)]
    if not fitting:
        raise UserError("the layers of this classifier are not those of guided-diffusion")
    return fitting[0], fitting[0] < count


def _fits(state: State, count: int, period: int) -> bool:
    """Whether the resolution can be halved at the multiples of `period`: all is alike between two of them."""
    for first in range(1, count, period):
        blocks = range(first, min(first + period - 1, count))
        kinds = {(len(state[f"input_blocks.{i}.0.out_layers.3.weight"]), _attended(state, i)) for i in blocks}
        if len(kinds) > 1:
            return False
    halving = range(period, count, period)
    return not any(
        _attended(state, i) or f"input_blocks.{i}.0.skip_connection.weight" in state for i in halving
    )


# -- what they do not tell -----------------------------------------------------------------------------------


def _completed(seen: dict[str, Any], unet: bool, size: int | None) -> Guess:
    """`seen`, and all else as in the released network that it is, or as the official defaults are."""
    for name, (height, settings) in (PUBLISHED_UNETS if unet else PUBLISHED_CLASSIFIERS).items():
        config = (UNetConfig if unet else ClassifierConfig)(**settings)
        if all(getattr(config, key) == value for key, value in seen.items()) and size in (None, height):
            return Guess({**settings, **seen}, height, f"taken as released in {name}.pt")
    widths = [int(mult * seen["model_channels"]) for mult in seen["channel_mult"]]
    heads: dict[str, Any] = {"num_heads": 4, "num_head_channels": -1}
    if not unet:
        heads = {"num_head_channels": math.gcd(64, *widths)}
    model = {"noise_schedule": "linear", "use_new_attention_order": False, "dropout": 0.0, **heads, **seen}
    # Attention is at a height of 32 and below in every released network.
    guessed = 32 * min(seen["attention_resolutions"], default=1)
    return Guess(model, size or guessed, "guessed as the official defaults are (--set changes them)")
