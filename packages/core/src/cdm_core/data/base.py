"""What a data set is to the rest: a description (`DataInfo`) and three deterministic splits (`Split`)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cdm_core.errors import UserError
from cdm_core.random import Draws, fold

if TYPE_CHECKING:
    from cdm_core.mixtures import GaussianMixture

Batch = tuple[Tensor, Tensor | None]

# Dequantisation noise lies on a lattice of this many points a grey level, each in the middle of its cell: the
# finest on which `to_model` never rounds a float32 across the border of two of 256 grey levels.
NOISE_CELLS = 2**15


@dataclass(frozen=True)
class DataInfo:
    """Shape, classes and grey levels of a data set, and the map from its integers to model inputs.

    Uniform dequantisation (Theis et al. 2016, "A note on the evaluation of generative models", section 3.1)
    makes a density over [-1, 1) comparable with the probability of the integers: `bits_per_dim`.
    """

    name: str
    shape: tuple[int, int, int]  # (C, H, W); points in d dimensions are (d, 1, 1)
    num_classes: int | None = None  # None: unlabelled
    class_names: tuple[str, ...] = ()
    levels: int | None = 256  # grey levels of the integer data; None: continuous, used as it is
    dequantise: bool = True  # x = 2 (v + u) / levels - 1, u ~ U[0, 1); False: x = 2 v / (levels - 1) - 1
    flip: bool = False  # random horizontal flip in training, never at evaluation

    def __post_init__(self) -> None:
        if self.levels is not None and not 2 <= self.levels <= 256:
            raise ValueError(f"levels must be 2 .. 256, or None for continuous data; got {self.levels}")

    @property
    def dim(self) -> int:
        """C * H * W."""
        return math.prod(self.shape)

    def to_model(self, pixels: Tensor, draws: Draws | None, *, train: bool = False) -> Tensor:
        """Model inputs of a batch of data.

        pixels (B, C, H, W) uint8 grey levels (float32 where continuous), on the device of `draws`; `train`
        allows the flip. Returns (B, C, H, W) float32, in [-1, 1) when dequantised, else in [-1, 1]. Draws one
        coin an image when it flips, then the dequantisation noise. Raises `ValueError` on another shape or
        dtype, or without the draws that it needs.
        """
        self._check(pixels)
        flip = train and self.flip
        if draws is None and (flip or (self.levels is not None and self.dequantise)):
            raise ValueError(f"{self.name}: to_model needs draws, to flip or to dequantise")
        if draws is not None and flip:
            coin = draws.uniform()[:, None, None, None]
            pixels = torch.where(coin < 0.5, pixels.flip(-1), pixels)
        if self.levels is None:
            return pixels
        value = pixels.double()
        if draws is None or not self.dequantise:
            return (2 * value / (self.levels - 1) - 1).float()
        noise = draws.uniform(*self.shape).double()
        noise = ((noise * NOISE_CELLS).floor() + 0.5) / NOISE_CELLS
        return (2 * (value + noise) / self.levels - 1).float()

    def _check(self, pixels: Tensor) -> None:
        dtype = torch.float32 if self.levels is None else torch.uint8
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != self.shape or pixels.dtype != dtype:
            raise ValueError(
                f"{self.name}: expected (B, {', '.join(map(str, self.shape))}) {dtype}, "
                f"got {tuple(pixels.shape)} {pixels.dtype}"
            )

    def to_pixels(self, x0: Tensor) -> Tensor:
        """The inverse of `to_model`: x0 (B, C, H, W) float in model units -> uint8 in 0 .. levels - 1.

        Values outside [-1, 1] are clamped. A dequantised level is a cell of width 2 / levels, so there the
        floor is the unbiased choice; otherwise it is the nearest level. Continuous data come back as is.
        """
        if self.levels is None:
            return x0
        unit = (x0.double() + 1) / 2
        value = (unit * self.levels).floor() if self.dequantise else (unit * (self.levels - 1)).round()
        return value.clamp(0, self.levels - 1).to(torch.uint8)

    def to_uint8(self, x0: Tensor) -> Tensor:
        """Pictures of x0 (B, C, H, W) float in model units: uint8 in 0 .. 255, black to white, rounded."""
        if self.levels is None:
            return ((x0.double() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return (self.to_pixels(x0).double() * 255 / (self.levels - 1)).round().to(torch.uint8)

    def bits_per_dim(self, log_density: Tensor) -> Tensor:
        """Bits per dimension of the integer data, from log_density (B,) in nats of model inputs.

        A grey level is 2 / levels wide in model units (2 / (levels - 1) if not dequantised); minus its log2
        is the constant. A uniform density over the cube gives log2(levels). Continuous data have no constant.
        """
        bits = -log_density / (self.dim * math.log(2))
        if self.levels is None:
            return bits
        return bits + math.log2((self.levels if self.dequantise else self.levels - 1) / 2)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self) | {"shape": list(self.shape), "class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        channels, height, width = values["shape"]
        names = tuple(values.get("class_names", ()))
        return cls(**{**values, "shape": (channels, height, width), "class_names": names})


class Split(Dataset[Batch]):
    """Images of one split, read in batches. Subclasses give `__len__`, `__getitems__` and, if any, `labels`.

    `__getitems__` returns a whole batch: a `DataLoader` takes a batch sampler and an identity `collate_fn`.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """pixels (B, C, H, W) uint8 (float32 where continuous) and labels (B,) int64 or None."""
        raise NotImplementedError

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64 class of every image, without reading the images; None: unlabelled."""
        return None


class TensorSplit(Split):
    """A split held in memory: rows `indices` (N,) int64 of pixels (M, C, H, W) and labels (M,) int64 or None.

    Splits of one set share their pixels: no copy is made. `indices` None: every row.
    """

    def __init__(self, pixels: Tensor, labels: Tensor | None, indices: Tensor | None = None) -> None:
        self._pixels, self._labels = pixels, labels
        self.indices = torch.arange(len(pixels)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = self.indices[torch.as_tensor(indices, dtype=torch.int64)]
        return self._pixels[rows], None if self._labels is None else self._labels[rows]

    @property
    def labels(self) -> Tensor | None:
        return None if self._labels is None else self._labels[self.indices]


class Data:
    """A data set: `info`, and its splits by name, each read when it is first asked for.

    Sampling from a run needs `info` alone, so it must not wait for, or fail on, absent images. `mixture` is
    the exact distribution where that is known.
    """

    def __init__(
        self,
        info: DataInfo,
        splits: Mapping[str, Callable[[], Split]],
        mixture: GaussianMixture | None = None,
    ) -> None:
        self.info, self.mixture = info, mixture
        self._readers = dict(splits)
        self._read: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """The split `name`: "train", "valid" or "test". `UserError` on another name or unreadable data."""
        if name not in self._readers:
            choices = ", ".join(self._readers)
            raise UserError(f"data set {self.info.name} has no split {name!r}; it has {choices}")
        if name not in self._read:
            self._read[name] = self._readers[name]()
        return self._read[name]


def carve(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (int64, ascending) that stay in training, and those held out; one of each at least."""
    if count < 2:
        raise UserError(f"a training set of {count} images leaves none to validate on; at least 2 are needed")
    held_out = min(max(1, round(share * count)), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(fold(seed, "valid")))
    return order[held_out:].sort().values, order[:held_out].sort().values


def in_memory(
    info: DataInfo,
    read_train: Callable[[], Batch],
    read_test: Callable[[], Batch],
    *,
    valid: float,
    split_seed: int,
) -> Data:
    """A data set that fits in memory: the readers return (pixels, labels); `valid` is carved from train."""

    @functools.cache
    def train() -> Batch:
        return _checked(info, read_train())

    def part(which: int) -> Split:
        pixels, labels = train()
        return TensorSplit(pixels, labels, carve(len(pixels), valid, split_seed)[which])

    return Data(
        info,
        {
            "train": lambda: part(0),
            "valid": lambda: part(1),
            "test": lambda: TensorSplit(*_checked(info, read_test())),
        },
    )


def _checked(info: DataInfo, batch: Batch) -> Batch:
    pixels, labels = batch
    if tuple(pixels.shape[1:]) != info.shape:
        raise UserError(f"{info.name}: images are {tuple(pixels.shape[1:])}, expected {info.shape} (C, H, W)")
    if labels is not None and len(labels) != len(pixels):
        raise UserError(f"{info.name}: {len(labels)} labels for {len(pixels)} images; the files are damaged")
    return batch
