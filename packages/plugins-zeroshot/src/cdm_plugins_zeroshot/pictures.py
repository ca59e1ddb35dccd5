"""Pictures for models that denoise an autoencoder's latents: fitted, encoded, and classified as latents.

Such a model (a diffusion transformer, Stable Diffusion) offers `to_images` and, for this, `to_latents(images)
-> latents`, the mean of what its encoder finds: the published classifiers draw nothing there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.data.folder import SUFFIXES, decode
from cdm_core.errors import UserError
from cdm_core.images import is_points
from cdm_core.runs import Run

Load = Callable[[Sequence[int]], Tensor]  # numbers of images -> latents (n, C, h, w) float32, on the CPU


def is_latent(run: Run) -> bool:
    """Whether the run's model takes latents that it can make of pictures itself."""
    return callable(getattr(run.model, "to_latents", None))


def of_latents(info: DataInfo) -> bool:
    """Whether data of this description may be latents: maps without grey levels."""
    return info.levels is None and not is_points(info)


def attach(run: Run, name: str) -> None:
    """Give a run on latents the pictures of a data set, by name; UserError where they do not fit."""
    full, record = run.registry.find("dataset", name)
    if not is_latent(run):
        raise UserError(
            f"--data {full}: {run.name} takes latents and has no autoencoder to make them: convert it again "
            "with --set model.autoencoder=FOLDER"
        )
    data = record.load()(record.config() if record.config else None)
    if data.info.num_classes != run.info.num_classes:
        raise UserError(
            f"--data {full} has {data.info.num_classes or 'no'} classes, {run.name} {run.info.num_classes}"
        )
    ours, theirs = (tuple(n.lower() for n in info.class_names) for info in (run.info, data.info))
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise UserError(f"--data {full} numbers its classes otherwise: {', '.join(data.info.class_names)}")
    run.data = data


def picture_shape(run: Run) -> tuple[int, int, int]:
    """(C, H, W) of what the autoencoder decodes to."""
    with torch.no_grad():
        decoded = run.model.to_images(torch.zeros(1, *run.info.shape, device=run.device))
    _, channels, height, width = decoded.shape
    return channels, height, width


def encoded(run: Run, pictures: Tensor) -> Tensor:
    """Latents (n, C, h, w) float32 of pictures (n, C', H, W) in [-1, 1], both on the CPU."""
    with torch.no_grad():
        return torch.cat(
            [run.model.to_latents(one.to(run.device)).float().cpu() for one in pictures.split(1)]
        )


def encoded_split(run: Run, name: str) -> Load:
    """Images of a split of the run's data: grey ones as colour, resized, encoded."""
    split, shape = run.split(name), picture_shape(run)
    assert run.data is not None
    info = replace(run.data.info, dequantise=False, flip=False)

    def load(numbers: Sequence[int]) -> Tensor:
        x = info.to_model(split.__getitems__(list(numbers))[0], None)
        x = x.expand(-1, shape[0], -1, -1)
        x = F.interpolate(x, size=shape[1:], mode="bicubic", antialias=True, align_corners=False)
        return encoded(run, x.clamp(-1, 1))

    return load


@dataclass(frozen=True)
class Pictures:
    """Files of images, with their classes where subfolders tell them."""

    names: list[str]
    files: list[Path]
    labels: NDArray[np.int64] | None

    def digest(self) -> str:
        """Of names and contents: 32 hexadecimal digits."""
        found = hashlib.blake2b(digest_size=16)
        for name, file in zip(self.names, self.files, strict=True):
            found.update(f"{name} {file.stat().st_size} ".encode())
            found.update(file.read_bytes())
        return found.hexdigest()


def listed_pictures(folder: Path, info: DataInfo, limit: int | None = None) -> Pictures:
    """The first `limit` images of a folder, in the order of their names, or of its subfolders in turn.

    Subfolders are classes: by their names where the model's classes have any, by their order otherwise.
    `UserError` where they are not these classes, or where there are no images.
    """
    if not folder.is_dir():
        raise UserError(f"--input {folder} is not a folder")
    files = _files(folder)
    if files:
        return Pictures([file.name for file in files[:limit]], files[:limit], None)
    parts = sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith("."))
    numbers = _numbers(folder, [part.name for part in parts], info)
    found = [(number, file) for number, part in zip(numbers, parts, strict=True) for file in _files(part)]
    if not found:
        raise UserError(f"--input {folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    # One of each class in turn: the first few are of every class.
    order = np.argsort(_rank([number for number, _ in found]), kind="stable")[:limit]
    chosen = [found[i] for i in order]
    names = [f"{file.parent.name}/{file.name}" for _, file in chosen]
    return Pictures(names, [file for _, file in chosen], np.array([number for number, _ in chosen]))


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())


def _rank(numbers: Sequence[int]) -> list[int]:
    """How often each has come before."""
    seen: dict[int, int] = {}
    ranks = []
    for number in numbers:
        ranks.append(seen.get(number, 0))
        seen[number] = ranks[-1] + 1
    return ranks


def _numbers(folder: Path, names: Sequence[str], info: DataInfo) -> list[int]:
    """Of the class that each subfolder is."""
    if info.class_names:
        unknown = [name for name in names if name not in info.class_names]
        if unknown:
            raise UserError(f"--input {folder}: subfolder {unknown[0]!r} is none of the model's classes")
        return [info.class_names.index(name) for name in names]
    if len(names) not in (0, info.num_classes):
        raise UserError(
            f"--input {folder} has {len(names)} subfolders and the model {info.num_classes} classes without "
            "names: one subfolder a class is wanted, in their order"
        )
    return list(range(len(names)))


def encoded_files(run: Run, files: Sequence[Path]) -> Load:
    """Images of files: cut to the shape, resized (bicubic), encoded."""
    channels, height, width = picture_shape(run)

    def fit(image: Image.Image) -> Image.Image:
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)

    def load(numbers: Sequence[int]) -> Tensor:
        shown = torch.stack([decode(files[number], channels, fit) for number in numbers])
        return encoded(run, shown.float() / 127.5 - 1)

    return load
