"""Networks that NVIDIA's EDM saved, `network-snapshot-*.pkl`, read for `cdm-run convert`.

Such a file is the pickle of a dictionary with the averaged network under `ema`, an object with all its
modules, each with the arguments that it was made with; `pickles` reads it without running any of it. The
weights are those of the official state dict, the settings the arguments of the outermost module, and what it
was not told, the official default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.formats import Foreign, filled, overridden
from cdm_core.settings import Selection
from cdm_plugins_guidance.edm import EDM
from cdm_plugins_guidance.edm_configs import EDMConfig
from cdm_plugins_guidance.edm_unet import Filter
from cdm_plugins_guidance.pickles import Instance, Persistent, read_pickle, shown

PRECONDS = {"VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm", "EDMPrecond": "edm"}
# What the official classes default to, where that is not the default here.
SONG = {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]}
MAX_VALUES, MAX_TEXT = 32, 80  # in an argument that is a list, and in a text; official ones have 7 and 12
MAX_NAME = 500  # characters in the name of a weight, which may be repeated for every weight
UNUSED = ("use_fp16", "label_dropout")  # how to train or run it, not what it is
LICENCE = "NVIDIA licenses the networks of EDM under CC BY-NC-SA 4.0: attribution, no commercial use."

_TORCH = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # what torch.save wrote before zips


def read_edm(path: Path, overrides: Sequence[str]) -> Foreign | None:
    """The averaged network in `path`; None when it is something else.

    UserError on a damaged or hostile pickle, a preconditioning that is none of EDM's, and weights that do not
    fit the settings.
    """
    if not _is_pickle(path):
        return None
    content = read_pickle(path)
    network = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(network, Persistent):
        return None
    where = str(path)
    guess = official_settings(network.class_name, _arguments(network, where), where)
    dataset = content.get("dataset_kwargs")
    guess["data"]["flip"] = _flip(dataset, where)
    values = overridden(guess, overrides)
    info = filled(DataInfo, values["data"], "data", where)
    config = filled(EDMConfig, values["model"], "model", where)
    state = _state_dict(network, where)
    _check_fit(config, info, state, where)
    return Foreign(state, Selection("guidance/edm", config), info, LICENCE)


def official_settings(network: str, arguments: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Tables `model` (of an `EDMConfig`) and `data` (of a `DataInfo`): what an official constructor was told.

    network: the name of its class, such as EDMPrecond; where: what to name in errors. UserError on a class
    that is not known, or without a size.
    """
    if network not in PRECONDS:
        known = ", ".join(PRECONDS)
        raise UserError(f"{where}: its network is a {shown(network)}, and only {known} are known")
    precond, told = PRECONDS[network], dict(arguments)
    default = "SongUNet" if precond in ("vp", "ve") else "DhariwalUNet"
    model = {"precond": precond, "model_type": told.pop("model_type", default)}
    if model["model_type"] == "SongUNet":
        model |= SONG
    missing = [name for name in ("img_resolution", "img_channels") if name not in told]
    if missing:
        raise UserError(f"{where}: its network was made without {' and '.join(missing)}")
    size, classes = told.pop("img_resolution"), told.pop("label_dim", 0)
    data = {"name": "converted", "shape": [told.pop("img_channels"), size, size], "dequantise": False}
    if classes:
        model["conditional"], data["num_classes"] = True, classes
    return {"model": model | {k: v for k, v in told.items() if k not in UNUSED}, "data": data}


def _is_pickle(path: Path) -> bool:
    """Whether the file is a pickle, by its first bytes, or claims to be one, by its name."""
    if path.is_dir():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if head.startswith(b"PK") or head[2:].startswith(_TORCH) or head[5:9] == b"\0\0\0{":
        return False  # zips and the older files of PyTorch; safetensors
    return path.suffix == ".pkl" or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def _arguments(network: Persistent, where: str) -> dict[str, Any]:
    positional, named = network.state.get("_init_args"), network.state.get("_init_kwargs")
    if type(positional) is not tuple or positional or not isinstance(named, dict):
        raise UserError(f"{where}: its network does not say with which arguments, by name, it was made")
    for name, value in named.items():
        if not isinstance(name, str) or len(name) > MAX_TEXT or not (name.isascii() and name.isidentifier()):
            raise UserError(
                f"{where}: its network was made with an argument of no proper name: {shown(name)}"
            )
        values = value if isinstance(value, list | tuple) else [value]
        if len(values) > MAX_VALUES or not all(map(_is_plain, values)):
            raise UserError(
                f"{where}: the argument {name} of its network is no number, text or short list of them"
            )
    return named


def _is_plain(value: Any) -> bool:
    """Whether it is a number, a text or None, and short, so that an error may quote it."""
    if isinstance(value, str):
        return len(value) <= MAX_TEXT and value.isprintable()
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _flip(dataset: Any, where: str) -> bool:
    """Whether its data were flipped."""
    flip = dataset.get("xflip") if isinstance(dataset, dict) else None
    if flip is not None and not isinstance(flip, int):
        raise UserError(f"{where}: xflip of its data set must be true or false, not {shown(flip)}")
    return bool(flip)


def _state_dict(network: Persistent, where: str) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a stored module by their official names, in float32."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()

    def once(value: Any, name: str) -> None:
        # Nothing in these networks is shared, and what is could be repeated without end.
        if id(value) in seen:
            raise UserError(f"{where}: {shown(name)} is a part of its network twice")
        seen.add(id(value))

    def walk(module: Any, prefix: str) -> None:
        if not isinstance(module, Persistent | Instance):
            raise UserError(f"{where}: {shown(prefix) or 'its network'} is no module")
        once(module, prefix)
        for table in ("_parameters", "_buffers", "_modules"):
            if module.state.get(table):
                once(module.state[table], f"{prefix}{table}")
        transient = module.state.get("_non_persistent_buffers_set", set())
        if not isinstance(transient, set):
            raise UserError(
                f"{where}: the names of {shown(prefix) or 'its network'}'s own buffers are no set"
            )
        tensors = {k: v for k, v in _table(module, "_buffers").items() if k not in transient}
        for name, tensor in {**_table(module, "_parameters"), **tensors}.items():
            if isinstance(tensor, Tensor):
                once(tensor, prefix + name)
                state[_joined(prefix, name, where)] = tensor.float()
        for name, child in _table(module, "_modules").items():
            if child is not None:
                walk(child, _joined(prefix, f"{name}.", where))

    walk(network, "")
    return state


def _joined(prefix: str, name: str, where: str) -> str:
    if len(prefix) + len(name) > MAX_NAME:
        raise UserError(f"{where}: a part of its network has a name of over {MAX_NAME} characters")
    return prefix + name


def _table(module: Persistent | Instance, name: str) -> dict[str, Any]:
    table = module.state.get(name)
    return {str(key): value for key, value in table.items()} if isinstance(table, dict) else {}


def _check_fit(config: EDMConfig, info: DataInfo, state: Mapping[str, Tensor], where: str) -> None:
    """Before the network is built: what a file only says of its size may be anything."""
    if min(info.shape) < 1:
        raise UserError(f"{where} was made for images of {info.shape}")
    if config.num_blocks * len(config.channel_mult) > len(state):
        raise UserError(f"{where} has fewer weights than the blocks of the network that it describes")
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in EDM(config, info).state_dict().items()}
    except (RuntimeError, OverflowError) as error:
        raise UserError(f"{where} describes a network of no possible size: {config}") from error
    for name, shape in expected.items():
        found = tuple(state[name].shape) if name in state else None
        if found != shape:
            problem = "is missing" if found is None else f"is {found}"
            raise UserError(f"{where} does not fit its settings: {name} should be {shape}, but {problem}")
    surplus = sorted(state.keys() - expected.keys())
    if surplus:
        raise UserError(f"{where} does not fit its settings: they have no place for {shown(surplus[0])}")
    for name in (name for name in state if name.endswith("resample_filter")):
        if not torch.allclose(state[name], Filter(config.resample_filter, "down").resample_filter):
            raise UserError(f"{where} does not fit its settings: {name} is not of {config.resample_filter}")
