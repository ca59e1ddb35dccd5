"""The standard image sets, read with torchvision by path, and downloaded by it where the settings allow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torchvision import datasets

from cdm_core.data.base import Batch, Data, DataInfo, Split, in_memory
from cdm_core.data.configs import (
    CelebAConfig,
    Cifar10Config,
    Cifar100Config,
    DownloadedConfig,
    FashionMnistConfig,
    MnistConfig,
    SvhnConfig,
)
from cdm_core.data.folder import decode
from cdm_core.errors import UserError

DIGITS = tuple("0123456789")
FASHION = tuple(datasets.FashionMNIST.classes)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100 = tuple(CIFAR100_NAMES.split())
# Left, upper, right, lower: 128x128 around the face, as in DDIM (Song et al. 2021) and its followers.
CELEBA_CROP = (25, 57, 153, 185)


def data_root(root: str | None) -> Path:
    """The folder of the standard sets: `root`, else $CDM_RUN_DATA, else ~/.cache/cdm-run/data."""
    return Path(root or os.environ.get("CDM_RUN_DATA") or "~/.cache/cdm-run/data").expanduser()


def mnist(config: MnistConfig) -> Data:
    """MNIST, grey, 28 + 2 pad pixels a side: 60,000 images to train and validate, 10,000 to test."""
    return _grey(config, "mnist", datasets.MNIST, DIGITS)


def fashion_mnist(config: FashionMnistConfig) -> Data:
    """Fashion-MNIST, grey, 28 + 2 pad pixels a side: 60,000 images to train and validate, 10,000 to test."""
    return _grey(config, "fashion-mnist", datasets.FashionMNIST, FASHION)


def cifar10(config: Cifar10Config) -> Data:
    """CIFAR-10, colour, 32x32: 50,000 images to train and validate, 10,000 to test."""
    return _cifar(config, "cifar10", datasets.CIFAR10, CIFAR10)


def cifar100(config: Cifar100Config) -> Data:
    """CIFAR-100 with its fine labels, colour, 32x32: 50,000 images to train and validate, 10,000 to test."""
    return _cifar(config, "cifar100", datasets.CIFAR100, CIFAR100)


def svhn(config: SvhnConfig) -> Data:
    """SVHN, colour, 32x32: 73,257 images (and 531,131 extra ones) to train and validate, 26,032 to test."""

    def read(root: Path, train: bool, download: bool) -> Batch:
        names = ("train", "extra") if train and config.extra else ("train",) if train else ("test",)
        sets = [datasets.SVHN(root, split=name, download=download) for name in names]
        pixels = torch.cat([torch.from_numpy(np.ascontiguousarray(part.data)) for part in sets])
        return pixels, torch.cat([torch.from_numpy(part.labels) for part in sets])

    return _standard(config, "svhn", (3, 32, 32), DIGITS, read)


def celeba(config: CelebAConfig) -> Data:
    """CelebA, colour, cropped to 128x128 and reduced to `size`; its own 162,770 / 19,867 / 19,962 partition.

    Images are decoded when they are read. `attribute` makes a two-class label of one of the 40 attributes.
    """
    config.check()
    root = data_root(config.root)
    info = DataInfo(
        name="celeba",
        shape=(3, config.size, config.size),
        num_classes=None if config.attribute is None else 2,
        class_names=() if config.attribute is None else (f"not {config.attribute}", config.attribute),
        dequantise=config.dequantise,
        flip=config.flip,
    )

    def read(name: str) -> Split:
        with reading("celeba", root, config.download):
            part = datasets.CelebA(root, split=name, target_type="attr", download=config.download)
        return CelebASplit(part, config.size, config.attribute)

    return Data(info, {name: partial(read, name) for name in ("train", "valid", "test")})


class CelebASplit(Split):
    """One partition of CelebA, decoded when it is read."""

    def __init__(self, part: datasets.CelebA, size: int, attribute: str | None) -> None:
        self._folder = Path(part.root, part.base_folder, "img_align_celeba")
        self._names, self._size = part.filename, size
        self._labels = None if attribute is None else part.attr[:, _attribute_column(part, attribute)].long()

    def __len__(self) -> int:
        return len(self._names)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        pixels = torch.stack([decode(self._folder / self._names[i], 3, self._crop) for i in indices])
        return pixels, None if self._labels is None else self._labels[torch.as_tensor(indices)]

    @property
    def labels(self) -> Tensor | None:
        return self._labels

    def _crop(self, image: Image.Image) -> Image.Image:
        face = image.crop(CELEBA_CROP)
        return face.resize((self._size, self._size), Image.Resampling.BILINEAR)


def _attribute_column(part: datasets.CelebA, attribute: str) -> int:
    # The header line of the attribute file ends in a space, which torchvision reads as an empty name.
    names = [name for name in part.attr_names if name]
    if attribute not in names:
        near = get_close_matches(attribute, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"celeba: no attribute {attribute!r} (data.attribute); {hint}")
    return names.index(attribute)


def _grey(config: MnistConfig, name: str, kind: type[datasets.MNIST], classes: tuple[str, ...]) -> Data:
    def read(root: Path, train: bool, download: bool) -> Batch:
        part = kind(root, train=train, download=download)
        return pad(part.data[:, None], (config.pad,) * 4), part.targets.long()

    side = 28 + 2 * config.pad
    return _standard(config, name, (1, side, side), classes, read)


def _cifar(
    config: DownloadedConfig, name: str, kind: type[datasets.CIFAR10], classes: tuple[str, ...]
) -> Data:
    def read(root: Path, train: bool, download: bool) -> Batch:
        # Pickles, but torchvision opens them only if their MD5 is that of the published files.
        part = kind(root, train=train, download=download)
        return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)

    return _standard(config, name, (3, 32, 32), classes, read)


def _standard(
    config: DownloadedConfig,
    name: str,
    shape: tuple[int, int, int],
    classes: Sequence[str],
    read: Callable[[Path, bool, bool], Batch],
) -> Data:
    """A set of torchvision's that fits in memory; `read(root, train, download)` returns (pixels, labels)."""
    config.check()
    info = DataInfo(
        name=name,
        shape=shape,
        num_classes=len(classes),
        class_names=tuple(classes),
        dequantise=config.dequantise,
        flip=config.flip,
    )
    root = data_root(config.root)

    def reader(train: bool) -> Batch:
        with reading(name, root, config.download):
            return read(root, train, config.download)

    return in_memory(
        info, lambda: reader(True), lambda: reader(False), valid=config.valid, split_seed=config.split_seed
    )


@contextmanager
def reading(name: str, root: Path, download: bool) -> Iterator[None]:
    """Turn whatever torchvision raises on absent, damaged or unreachable files into one `UserError`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = (
            "check the network, or set data.root to a folder that holds the set in torchvision's layout"
            if download
            else "set data.root to a folder that holds the set in torchvision's layout, or data.download=true"
        )
        raise UserError(f"{name}: cannot read the data set in {root}: {reason}; {remedy}") from error
