"""Data of which some labels are missing: few labels, or those of another domain.

y of a training image says, of a class k (of attributes, elementwise):

    k        class k
    -1       there is no label: the image is for the denoiser alone
    -2 - k   class k, and the image is for the head alone: it is there once more, not counted by the denoiser

The released code collects labelled images until they make a batch, and classifies that. What would be in that
buffer depends on what came before, in each process apart. Here an epoch has labelled images more than once
(`again`): every step has enough of them, the same ones in one process or many and after a resume, and the
denoiser sees each image once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_core.data import Data, DataInfo, Split
from cdm_core.data.base import Batch
from cdm_core.errors import UserError
from cdm_core.formats import filled
from cdm_core.manager import load_registry
from cdm_core.random import fold
from cdm_plugins_joint.configs import DomainsConfig, PartlyLabelledConfig

UNLABELLED = -1


def encoded_alone(y: Tensor) -> Tensor:
    """Labels y >= 0 of images for the head alone."""
    return -2 - y


def decoded(y: Tensor) -> tuple[Tensor, Tensor]:
    """Classes, -1 where there is no label, and whether a row is for the head alone (bool); shapes of y."""
    alone = y < UNLABELLED
    return torch.where(alone, -2 - y, y), alone


def load(name: str, settings: Mapping[str, Any], table: str, download: bool = True) -> Data:
    """The data set of that name with these settings of its own; `table` names them in errors."""
    _, record = load_registry().find("dataset", name, ["core"])
    if record.config is None:
        return record.load()(None)
    if not download and "download" in {field.name for field in dataclasses.fields(record.config)}:
        settings = {"download": False, **settings}
    return record.load()(filled(record.config, settings, table, "the configuration"))


# -- few labels ----------------------------------------------------------------------------------------------


def partly_labelled(config: PartlyLabelledConfig) -> Data:
    """The data set `config.of`; validation and test splits are its own, labels and all."""
    config.check()
    data = load(config.of, config.settings, "data.settings")
    if not data.info.num_classes:
        raise UserError(f"data.of: the data set {config.of!r} has no labels, so it has none to lose")
    return Data(
        data.info,
        {
            "train": lambda: PartlyLabelled(data.split("train"), config),
            "valid": partial(data.split, "valid"),
            "test": partial(data.split, "test"),
        },
        data.mixture,
    )


class PartlyLabelled(Split):
    """A split whose labels are kept for a share of the images, those once more at its end; y as above."""

    def __init__(self, split: Split, config: PartlyLabelledConfig) -> None:
        if split.labels is None:
            raise UserError(f"data.of: the data set {config.of!r} has no labels, so it has none to lose")
        self._split = split
        kept = chosen(split.labels, config.labels, config.label_seed)
        count = round(config.again / (1 - config.again) * len(split))
        more = kept[torch.arange(count) % len(kept)]
        whole = torch.full_like(split.labels, UNLABELLED)
        whole[kept] = split.labels[kept]
        self._rows = torch.cat([torch.arange(len(split)), more])
        self._labels = torch.cat([whole, encoded_alone(split.labels[more])])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        places = torch.as_tensor(indices, dtype=torch.int64)
        pixels, _ = self._split.__getitems__(self._rows[places].tolist())
        return pixels, self._labels[places]

    @property
    def labels(self) -> Tensor | None:
        return self._labels


def chosen(y: Tensor, share: float, seed: int) -> Tensor:
    """Which images keep their label, (n,) int64, in an order drawn with `seed`.

    y (N,): as large a part of every class, one image at least; y (N, K): of all images.
    """
    generator = torch.Generator().manual_seed(fold(seed, "labels"))
    groups = [torch.arange(len(y))] if y.ndim > 1 else [(y == k).nonzero()[:, 0] for k in y.unique()]
    parts = []
    for group in groups:
        order = torch.randperm(len(group), generator=generator)
        parts.append(group[order[: max(1, round(share * len(group)))]])
    kept = torch.cat(parts)
    return kept[torch.randperm(len(kept), generator=generator)]


# -- two domains ---------------------------------------------------------------------------------------------


def domains(config: DomainsConfig) -> Data:
    """Labelled images of one data set, unlabelled ones of another, which it is validated and tested on."""
    config.check()
    source = load(config.source, config.source_settings, "data.source_settings", config.download)
    target = load(config.target, config.target_settings, "data.target_settings", config.download)
    return adapted(source, target, config)


def adapted(source: Data, target: Data, config: DomainsConfig) -> Data:
    """`domains` of data sets that are there."""
    shape = (config.channels, config.size, config.size)
    for name, info in (("source", source.info), ("target", target.info)):
        if info.levels is None:
            raise UserError(f"data.{name}: the data {info.name!r} are no images")
    if not source.info.num_classes or source.info.num_classes != target.info.num_classes:
        raise UserError(
            f"data.source has {source.info.num_classes or 'no'} classes and data.target "
            f"{target.info.num_classes or 'no'}: they must be the same ones"
        )
    if source.info.levels != target.info.levels:
        raise UserError(
            f"data.source has {source.info.levels} grey levels and data.target {target.info.levels}"
        )
    info = dataclasses.replace(
        target.info, name=f"{source.info.name} to {target.info.name}", shape=shape, flip=False
    )
    held_out = {name: partial(_fitted, target, name, info) for name in ("valid", "test")}
    return Data(
        info,
        {
            "train": lambda: Domains(_fitted(source, "train", info), _fitted(target, "train", info)),
            **held_out,
        },
    )


def _fitted(data: Data, name: str, info: DataInfo) -> Fitted:
    return Fitted(data.split(name), info)


class Fitted(Split):
    """A split whose images are made those of `info`."""

    def __init__(self, split: Split, info: DataInfo) -> None:
        self._split, self._info = split, info

    def __len__(self) -> int:
        return len(self._split)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        pixels, labels = self._split.__getitems__(indices)
        return fitted(pixels, self._info.shape), labels

    @property
    def labels(self) -> Tensor | None:
        return self._split.labels


class Domains(Split):
    """The images of two splits, the second's without their labels."""

    def __init__(self, source: Split, target: Split) -> None:
        if source.labels is None:
            raise UserError("data.source has no labels")
        self._parts = source, target
        self._labels = torch.cat([source.labels, torch.full((len(target),), UNLABELLED)])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        places = torch.as_tensor(indices, dtype=torch.int64)
        second = places >= len(self._parts[0])
        pixels: Tensor | None = None
        for split, here, first in zip(self._parts, (~second, second), (0, len(self._parts[0])), strict=True):
            if not bool(here.any()):
                continue
            found, _ = split.__getitems__((places[here] - first).tolist())
            if pixels is None:
                pixels = found.new_empty(len(places), *found.shape[1:])
            pixels[here] = found
        assert pixels is not None
        return pixels, self._labels[places]

    @property
    def labels(self) -> Tensor | None:
        return self._labels


def fitted(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images (B, C, H, W) uint8 as (B, *shape): grey repeated or colours averaged, padded or reduced."""
    channels, height, width = shape
    if pixels.shape[1] != channels:
        grey = (
            pixels if pixels.shape[1] == 1 else pixels.float().mean(1, keepdim=True).round().to(pixels.dtype)
        )
        pixels = grey.expand(-1, channels, -1, -1)
    rows, columns = pixels.shape[2:]
    if rows > height or columns > width:
        scale = min(height / rows, width / columns)
        size = [max(1, round(rows * scale)), max(1, round(columns * scale))]
        smaller = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True, align_corners=False)
        pixels = smaller.round().to(pixels.dtype)
        rows, columns = size
    left, top = (width - columns) // 2, (height - rows) // 2
    return F.pad(pixels, (left, width - columns - left, top, height - rows - top)).contiguous()
