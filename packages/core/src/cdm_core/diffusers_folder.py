"""Folders in which the library `diffusers` keeps a model: `config.json` and its weights beside it.

A pipeline's folder has `model_index.json` and one such folder a component, or, old ones, all in one place.

The library is imported when a model of its own is asked for, and nothing is ever fetched from a hub. Weights
are read as tensors alone.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cdm_core.errors import MissingPackage, UserError
from cdm_core.formats import read_tensors

WEIGHTS = tuple(
    f"diffusion_pytorch_model{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
)

# Layers of attention had other names once; folders of that time are still about.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def library(name: str, what: str) -> Any:
    """The module `name`, diffusers or its companion; UserError, saying that `what` needs it, if missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(f"{what} needs the library {name} ({error}): pip install {name}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file; UserError where it is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} holds no table of settings")
    return table


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in `folder`, float32, under the library's present names; UserError where there are none."""
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has no weights: expected one of {', '.join(WEIGHTS)} in it")
    content = read_tensors(found[0])
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{found[0]} holds other things than weights by name")
    return {_present_name(name): tensor.float() for name, tensor in content.items()}


def _present_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) > 2 and "attentions" in parts:
        parts[-2] = RENAMED.get(parts[-2], parts[-2])
    return ".".join(parts)


def architecture(table: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says of the network; all but notes on itself (`_class_name`, paths)."""
    return {name: value for name, value in table.items() if not name.startswith("_")}


def build(name: str, settings: Mapping[str, Any], where: str) -> Any:
    """The library's module of class `name`, freshly initialised; UserError, naming `where`, if refused.

    Settings that the class does not take must be off, as other versions of it write them, or what it makes of
    the others itself.
    """
    cls = getattr(library("diffusers", where), name)
    known = settings.keys() & inspect.signature(cls).parameters.keys()
    try:
        model = cls(**{key: settings[key] for key in known})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{where}: {name} of diffusers cannot be built from it: {error}") from error
    own = dict(model.config)
    wrong = [
        key for key in settings.keys() - known if settings[key] not in (None, False, "default", own.get(key))
    ]
    if wrong:
        unknown = ", ".join(sorted(wrong))
        raise UserError(f"{where}: {name} of the installed diffusers does not know {unknown}")
    return model


def load(name: str, folder: Path) -> Any:
    """The library's model of class `name` in `folder`, with its weights, in evaluation mode, on the CPU."""
    model = build(name, architecture(read_json(folder / "config.json")), str(folder / "config.json"))
    try:
        model.load_state_dict(read_weights(folder))
    except RuntimeError as error:
        problem = " ".join(str(error).split()[:40])
        raise UserError(f"the weights in {folder} do not fit its config.json: {problem}") from error
    return model.eval()


# -- denoisers with their schedulers -------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """A denoiser: class, `config.json`, `scheduler_config.json`; `path` has the weights.

    autoencoder: the folder of the pipeline's, None without; class_names: as the pipeline has them, or ().
    """

    path: Path
    kind: str
    settings: dict[str, Any]
    scheduler: dict[str, Any]
    autoencoder: Path | None
    class_names: tuple[str, ...]

    def weights(self) -> dict[str, Tensor]:
        """As `read_weights`."""
        return read_weights(self.path)


def find(path: Path, kinds: tuple[str, ...]) -> Folder | None:
    """The denoiser, of one of the classes `kinds`, in a folder of diffusers; None where there is none.

    path: the folder of a pipeline or of a denoiser, or its `model_index.json` or `config.json`. UserError
    where a denoiser lacks its scheduler.
    """
    if path.is_file() and path.name not in ("model_index.json", "config.json"):
        return None
    root = path if path.is_dir() else path.parent
    for folder in (root, root / "unet", root / "transformer"):
        config = folder / "config.json"
        if config.is_file() and (table := read_json(config)).get("_class_name") in kinds:
            pipeline = root if (root / "model_index.json").is_file() else folder.parent
            return _described(folder, pipeline, table)
    return None


def _described(folder: Path, pipeline: Path, table: dict[str, Any]) -> Folder:
    places = [place / "scheduler_config.json" for place in (folder, pipeline / "scheduler", pipeline)]
    found = [place for place in places if place.is_file()]
    if not found:
        raise UserError(f"{folder} has no scheduler_config.json, nor {pipeline / 'scheduler'}: add it")
    index = pipeline / "model_index.json"
    labels = (read_json(index) if index.is_file() else {}).get("id2label") or {}
    names = tuple(str(labels.get(str(i), "")) for i in range(len(labels)))
    coder = pipeline / "vae"
    return Folder(
        path=folder,
        kind=table["_class_name"],
        settings=architecture(table),
        scheduler=read_json(found[0]),
        autoencoder=coder.resolve() if (coder / "config.json").is_file() else None,
        class_names=names if all(names) else (),
    )
