"""Foreign checkpoints: what a reader makes of one, and the one safetensors file that `convert` writes.

The file holds the weights under the names of our model and, as JSON under one metadata key, all that is
needed to build that model again. Nothing is ever unpickled but tensors and plain containers.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cdm_core.checkpoints import disk, write_synced
from cdm_core.config import Merged, fill, parse_overrides, plain
from cdm_core.data import DataInfo
from cdm_core.errors import UserError
from cdm_core.settings import Selection

if TYPE_CHECKING:
    from cdm_core.manager import Registry

KEY = "cdm_run"
T = TypeVar("T")


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint in our terms.

    state_dict: tensors under the names of our model; model: its full name and settings; info: the data that
    it was trained on; note: what had to be guessed, in a sentence.
    """

    state_dict: Mapping[str, Tensor]
    model: Selection
    info: DataInfo
    note: str = ""


# -- reading what others wrote -------------------------------------------------------------------------------


def read_tensors(path: Path) -> Any:
    """The content of a `.safetensors` file, or of a PyTorch file of tensors and plain containers, on the CPU.

    Raises UserError when the file is damaged, is of another kind, or would run code.
    """
    with _readable(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            with warnings.catch_warnings(
                action="ignore"
            ):  # of the pickle's protocol: it loads or it does not
                return torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # any bytes may come here, and they raise anything
            problem = f"it is damaged, or holds more than tensors ({type(error).__name__})"
            raise UserError(
                f"{path} cannot be read as a PyTorch file: {problem}; nothing in it was run"
            ) from error


def overridden(guess: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A reader's guess, tables of plain values by name, with the texts `a.b=c` of `--set` laid over it."""
    merged = {table: dict(values) for table, values in guess.items()}
    for table, values in parse_overrides(overrides).items():
        if table not in merged or not isinstance(values, Mapping):
            raise UserError(f"--set {table}: a checkpoint has settings of {' and '.join(merged)} only")
        merged[table].update(values)
    return merged


def filled(cls: type[T], values: Mapping[str, Any], table: str, where: str) -> T:
    """An instance of the dataclass `cls`, its values checked; errors name `table` and the place `where`."""
    made: T = fill(cls, values, table, Merged(origin={f"{table}.{key}": where for key in values}))
    return made


# -- the converted file --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """What a converted file says of itself: the model, the data that it was trained on, and the note."""

    model: Selection
    info: DataInfo
    note: str


def save_converted(foreign: Foreign, dst: Path) -> None:
    """Write `dst`, aside first and then renamed: a whole file or none. UserError where it cannot be."""
    config = foreign.model.config
    settings = {} if config is None else plain(config)
    about = {
        "model": {"name": foreign.model.name, **settings},
        "data": foreign.info.to_dict(),
        "note": foreign.note,
    }
    tensors = {name: tensor.contiguous().clone() for name, tensor in foreign.state_dict.items()}
    aside = dst.with_name(f".{dst.name}.{os.getpid()}")
    with disk(dst):
        dst.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(aside, save(tensors, {KEY: json.dumps(about)}))
            aside.replace(dst)
        finally:
            aside.unlink(missing_ok=True)


def read_metadata(path: Path, registry: Registry) -> Converted:
    """What `save_converted` wrote beside the weights; UserError on any other file."""
    with _readable(path), safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise UserError(
            f"{path} was not made by `cdm-run convert`, which adds what builds its model: convert it first"
        )
    try:
        about = json.loads(text)
        values = dict(about["model"])
        name, record = registry.find("model", values.pop("name"))
        config = None if record.config is None else filled(record.config, values, "model", str(path))
        return Converted(Selection(name, config), DataInfo.from_dict(about["data"]), about["note"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its description of the model cannot be read: {error!r}") from error


def load_converted(path: Path, registry: Registry) -> tuple[nn.Module, Converted]:
    """The model of a converted file, its weights loaded, on the CPU; UserError where they do not fit."""
    about = read_metadata(path, registry)
    with _readable(path):
        state = load_file(path)
    return build(Foreign(state, about.model, about.info, about.note), registry, str(path)), about


def build(foreign: Foreign, registry: Registry, source: str) -> nn.Module:
    """The model of `foreign` with its weights; UserError, naming `source`, where they do not fit it."""
    _, record = registry.find("model", foreign.model.name)
    model: nn.Module = record.load()(foreign.model.config, foreign.info)
    try:
        model.load_state_dict(dict(foreign.state_dict))
    except RuntimeError as error:
        problem = " ".join(str(error).split()[:40])
        raise UserError(f"{source} does not fit the model {foreign.model.name!r}: {problem}") from error
    return model


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what reading `path` raises into a `UserError`."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or is damaged: {error}") from error
