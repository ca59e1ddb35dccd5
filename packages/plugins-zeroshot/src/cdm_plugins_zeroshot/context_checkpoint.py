"""Checkpoints of the MNIST diffusion classifier and of its parent, read for `cdm-run convert`.

A file is the flat state dict of their DDPM wrapper: the network under `nn_model.`, beside it tables of the
noise schedule, of which `sqrt_beta_t` tells n_T and both ends of beta. The network's own state dict will do
too. Sizes are read off the shapes. The sign of the one-hot class is not told: minus, as both codes have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.formats import Foreign, filled, overridden, read_tensors
from cdm_core.settings import Selection
from cdm_plugins_zeroshot.context_unet_configs import ContextUnetConfig

WRAPPERS = ("nn_model", "module", "_orig_mod")  # theirs, data-parallel training's, torch.compile's
# A tensor of every such network and its number of axes, by which one is known.
MARKS = {
    "init_conv.conv1.0.weight": 4,
    "contextembed1.model.0.weight": 2,
    "timeembed2.model.2.weight": 2,
    "up0.0.weight": 4,
    "up2.model.2.conv2.1.running_var": 1,
    "out.3.weight": 4,
}
BETA = "sqrt_beta_t"


def read_context(path: Path, overrides: Sequence[str] = ()) -> Foreign | None:
    """The checkpoint in `path`; None when it is something else. UserError on a damaged file."""
    if path.is_dir():
        return None
    content = _unwrapped(read_tensors(path))
    state = {name: tensor for name, tensor in content.items() if "." in name}  # without the wrapper's tables
    if any(name not in state or state[name].ndim != axes for name, axes in MARKS.items()):
        return None
    schedule = _schedule(content[BETA], path) if BETA in content else {}
    values = overridden({"model": {"n_feat": _width(state), **schedule}, "data": _data(state)}, overrides)
    config = filled(ContextUnetConfig, values["model"], "model", "--set")
    info = filled(DataInfo, values["data"], "data", "--set")
    note = _note(config, schedule, overrides)
    return Foreign(state, Selection("zeroshot/context-unet", config), info, note)


def _unwrapped(content: Any) -> dict[str, Tensor]:
    """Tensors by name, floating-point ones in float32; empty where the file holds anything else."""
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        return {}
    tensors = {}
    for name, tensor in content.items():
        own = ".".join(piece for piece in str(name).split(".") if piece not in WRAPPERS)
        tensors[own] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def _width(state: Mapping[str, Tensor]) -> int:
    return len(state["init_conv.conv1.0.weight"])


def _data(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Pixels in 0 .. 255 as the published training has them: divided by 255, without dequantisation."""
    rows, columns = state["up0.0.weight"].shape[2:]
    return {
        "name": "converted",
        "shape": [state["init_conv.conv1.0.weight"].shape[1], 4 * rows, 4 * columns],
        "num_classes": state["contextembed1.model.0.weight"].shape[1],
        "dequantise": False,
    }


def _schedule(root: Tensor, path: Path) -> dict[str, Any]:
    """n_T and the ends of beta, from the square roots of the n_T + 1 betas; UserError where not linear."""
    beta = root.double().square()
    first, last = (float(f"{float(end):.6g}") for end in (beta[0], beta[-1]))  # float32 has no more digits
    line = torch.linspace(first, last, len(beta), dtype=torch.float64)
    if not torch.allclose(beta, line, rtol=1e-4, atol=0):
        raise UserError(f"{path}: its noise schedule is not linear in beta, the only one that is known")
    return {"n_T": len(beta) - 1, "beta_start": first, "beta_end": last}


def _note(config: ContextUnetConfig, schedule: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """What the file does not tell and nobody has told."""
    told = {text.partition("=")[0].strip() for text in overrides}
    guesses = []
    if not schedule and not {"model.n_T", "model.beta_start", "model.beta_end"} <= told:
        ends = f"beta from {config.beta_start} to {config.beta_end}"
        guesses.append(f"noise schedule, taken for {config.n_T} levels, {ends}")
    if "model.sign" not in told:
        guesses.append(f"sign of the one-hot class, taken for {config.sign:+d}")
    return f"Not told by the file: {'; '.join(guesses)}." if guesses else ""
