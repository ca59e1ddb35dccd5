"""scikit-learn's handwritten digits (Alpaydin and Kaynak, UCI 1998): 1,797 real 8x8 images, no network."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cdm_core.data.base import Batch, Data, DataInfo, in_memory
from cdm_core.data.configs import DigitsConfig

TEST_SHARE = 0.2


def load(config: DigitsConfig) -> Data:
    """20% of each class are the test split; `config.valid` of the rest are the validation split."""
    config.check()
    info = DataInfo(
        name="digits",
        shape=(1, 8, 8),
        num_classes=10,
        class_names=tuple("0123456789"),
        levels=17,
        dequantise=config.dequantise,
    )
    return in_memory(
        info,
        lambda: _read(0, config.test_seed),
        lambda: _read(1, config.test_seed),
        valid=config.valid,
        split_seed=config.split_seed,
    )


def _read(which: int, test_seed: int) -> Batch:
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).to(torch.int64)
    parts = train_test_split(
        range(len(pixels)), test_size=TEST_SHARE, stratify=labels.numpy(), random_state=test_seed
    )
    rows = torch.tensor(sorted(parts[which]))
    return pixels[rows], labels[rows]
