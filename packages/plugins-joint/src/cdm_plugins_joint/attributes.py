"""CelebA (Liu et al. 2015) with all 40 attributes of a face as labels, each 0 or 1."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision import datasets

from cdm_core.data import Data, DataInfo, Split
from cdm_core.data.base import Batch
from cdm_core.data.vision import CelebASplit, data_root, reading
from cdm_plugins_joint.configs import CelebAAttributesConfig

_NAMES = """
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair
Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup
High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose
Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat
Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
"""
NAMES = tuple(_NAMES.split())


def celeba(config: CelebAAttributesConfig) -> Data:
    """CelebA as core has it, cropped and reduced; y (B, 40) int64 in the order of `NAMES`."""
    config.check()
    root = data_root(config.root)
    info = DataInfo(
        name="celeba-attributes",
        shape=(3, config.size, config.size),
        num_classes=len(NAMES),
        class_names=NAMES,
        dequantise=config.dequantise,
        flip=config.flip,
    )

    def read(name: str) -> Split:
        with reading("celeba", root, config.download):
            part = datasets.CelebA(root, split=name, target_type="attr", download=config.download)
        return Attributes(CelebASplit(part, config.size, None), part.attr)

    return Data(info, {name: partial(read, name) for name in ("train", "valid", "test")})


class Attributes(Split):
    """A split with its images' attributes, (N, K) 0 or 1."""

    def __init__(self, split: Split, attributes: Tensor) -> None:
        self._split, self._labels = split, attributes.long()

    def __len__(self) -> int:
        return len(self._split)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        pixels, _ = self._split.__getitems__(indices)
        return pixels, self._labels[torch.as_tensor(indices)]

    @property
    def labels(self) -> Tensor | None:
        return self._labels
