"""Any tree of images as a data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cdm_core.data.base import Batch, Data, DataInfo, Split
from cdm_core.data.configs import ImageFolderConfig
from cdm_core.errors import UserError
from cdm_core.random import fold

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}


def load(config: ImageFolderConfig) -> Data:
    """The images under `config.root`, decoded when they are read.

    Subfolders `train`, and perhaps `valid` (or `val`) and `test`, are the splits where no others hold images.
    Missing splits are carved by a hash of each image's path, so an image keeps its split when others come or
    go. The subfolder is the class when every image lies in one. Raises `UserError` when the folder is missing
    or has too few images.
    """
    config.check()
    root = Path(config.root).expanduser()
    if not config.root or not root.is_dir():
        raise UserError(f"image-folder: set data.root to a folder of images; {config.root!r} is not a folder")
    splits = _splits(root, config)
    classes = _classes(splits, root)
    info = DataInfo(
        name="image-folder",
        shape=(config.channels, config.size, config.size),
        num_classes=len(classes) if classes else None,
        class_names=classes,
        dequantise=config.dequantise,
        flip=config.flip,
    )

    def read(name: str) -> Split:
        base, paths = splits[name]
        return FileSplit(base, paths, classes, config.size, config.channels)

    return Data(info, {name: partial(read, name) for name in ("train", "valid", "test")})


class FileSplit(Split):
    """Images `paths`, relative to `base`, decoded to channels x size x size when they are read.

    `classes` non-empty: the first folder of each path is its class.
    """

    def __init__(
        self, base: Path, paths: Sequence[str], classes: Sequence[str], size: int, channels: int
    ) -> None:
        self.base, self.paths = base, list(paths)
        self._size, self._channels = size, channels
        number = {name: i for i, name in enumerate(classes)}
        self._labels = torch.tensor([number[_top(path)] for path in self.paths]) if classes else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = [decode(self.base / self.paths[i], self._channels, self._fit) for i in indices]
        return torch.stack(images), None if self._labels is None else self._labels[torch.as_tensor(indices)]

    @property
    def labels(self) -> Tensor | None:
        return self._labels

    def _fit(self, image: Image.Image) -> Image.Image:
        if min(image.size) < self._size:
            width, height = image.size
            raise ValueError(f"it is {width}x{height}, smaller than data.size {self._size}")
        return ImageOps.fit(image, (self._size, self._size), Image.Resampling.BICUBIC)


def decode(path: Path, channels: int, fit: Callable[[Image.Image], Image.Image]) -> Tensor:
    """The image of a file, as `fit` cuts it, (channels, H, W) uint8; channels 1 is grey, 3 is RGB.

    Raises `UserError` with the file's name when it is damaged, is not an 8-bit image, or `fit` rejects it by
    `ValueError`.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                raise ValueError(f"it is not an 8-bit image (mode {image.mode})")
            upright = ImageOps.exif_transpose(image)
            array = np.array(fit(upright.convert("L" if channels == 1 else "RGB")))
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read image {path}: it is damaged or not an image; remove it") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path}: {error}; mend or remove it") from error
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1).contiguous()


def _top(path: str) -> str:
    return path.partition("/")[0]


def _images(base: Path) -> list[str]:
    """Paths of the images under `base`, relative with forward slashes, sorted; hidden ones are left out."""
    found = []
    for folder, subfolders, files in os.walk(base, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names = (Path(folder, name) for name in files if not name.startswith("."))
        found += [path.relative_to(base).as_posix() for path in names if path.suffix.lower() in SUFFIXES]
    return sorted(found)


def _splits(root: Path, config: ImageFolderConfig) -> dict[str, tuple[Path, list[str]]]:
    """Split name -> (folder, paths relative to it)."""
    splits = {name: (folder, _images(folder)) for name, folder in _split_folders(root).items()}
    for name, share in (("test", config.test), ("valid", config.valid)):
        if name not in splits:
            base, paths = splits["train"]
            splits["train"], splits[name] = (
                (base, part) for part in _carve(paths, share, config.split_seed, name)
            )
    for name, (folder, paths) in splits.items():
        if not paths:
            kinds = ", ".join(sorted(SUFFIXES))
            raise UserError(f"image-folder: no image for the {name} split in {folder} (looked for {kinds})")
    return splits


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders that are splits; `root` itself as "train" where its subfolders are classes, if anything."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    named = [folder for folder in folders if folder.name in SPLIT_FOLDERS]
    splits = {SPLIT_FOLDERS[folder.name]: folder for folder in named}
    if "train" not in splits:
        return {"train": root}
    others = [folder.name for folder in folders if folder not in named and _images(folder)]
    if len(splits) < len(named) or (others and len(named) > 1):
        names = ", ".join([folder.name for folder in named] + others)
        raise UserError(f"image-folder: {root} holds {names}: keep one folder a split, train, valid and test")
    # A class may be called "train" too: alone beside other classes, it is one of them.
    return {"train": root} if others else splits


def _carve(paths: list[str], share: float, seed: int, purpose: str) -> tuple[list[str], list[str]]:
    """The paths that stay, and the `share` held out: each by the hash of its own name, and one at least."""
    position = {path: fold(seed, purpose, path) / 2**63 for path in paths}
    first = min(position, key=position.__getitem__, default=None)
    held_out = {path for path in paths if position[path] < share or path == first}
    return [path for path in paths if path not in held_out], [path for path in paths if path in held_out]


def _classes(splits: dict[str, tuple[Path, list[str]]], root: Path) -> tuple[str, ...]:
    """Names of the classes, sorted; none unless every image lies in a subfolder."""
    if any("/" not in path for _, paths in splits.values() for path in paths):
        return ()
    found = {name: {_top(path) for path in paths} for name, (_, paths) in splits.items()}
    for name in ("valid", "test"):
        unknown = sorted(found[name] - found["train"])
        if unknown:
            raise UserError(
                f"image-folder: class {unknown[0]!r} in {root} is in the {name} split but not in train"
            )
    return tuple(sorted(found["train"]))
