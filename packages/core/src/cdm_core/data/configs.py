"""Settings of the data sets. Nothing here imports torch: `plugins` and `--help` read these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is a share of the images, between 0 and 1; got {value}")


@dataclass(frozen=True)
class CarvedConfig:
    """A set with no validation split of its own: one is carved from the training split, never from test."""

    valid: float = 0.05  # share of the training images
    split_seed: int = 0  # which ones

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        _check_share("valid", self.valid)


@dataclass(frozen=True)
class DigitsConfig(CarvedConfig):
    """scikit-learn's real 8x8 digits, 17 grey levels."""

    dequantise: bool = True
    test_seed: int = 0  # which fifth is the test split: figures of different ones are not of the same images


@dataclass(frozen=True)
class GaussianMixtureConfig:
    """Points of a Gaussian mixture whose density, score and denoiser are known exactly.

    ring: equal isotropic components on a circle (two dimensions). random: means on a sphere, weights and full
    covariances drawn with `seed`. explicit: isotropic components at `means` with `weights`.
    """

    dim: int = 2
    components: int = 8
    layout: Literal["ring", "random", "explicit"] = "ring"
    radius: float = 1.0  # distance of every mean from the origin (ring, random)
    std: float = 0.15  # largest standard deviation of a component
    seed: int = 0  # of the layout and of the points
    means: tuple[tuple[float, ...], ...] = ()  # explicit only: components times dim
    weights: tuple[float, ...] = ()  # explicit only; empty: equal
    train_points: int = 50_000
    valid_points: int = 5_000
    test_points: int = 10_000

    def check(self) -> None:
        """Raise `ValueError` on values out of range or at odds with each other."""
        for name in ("dim", "components", "train_points", "valid_points", "test_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.std <= 0 or self.radius < 0:
            raise ValueError(f"std must be > 0 and radius >= 0, got {self.std} and {self.radius}")
        if self.layout == "ring" and self.dim != 2:
            raise ValueError(f"layout 'ring' has dim 2, got {self.dim}; use layout 'random'")
        if self.layout == "explicit":
            self._check_explicit()
        elif self.means or self.weights:
            raise ValueError(f"means and weights belong to layout 'explicit', not {self.layout!r}")

    def _check_explicit(self) -> None:
        if len(self.means) != self.components or any(len(mean) != self.dim for mean in self.means):
            raise ValueError(
                f"means must hold {self.components} points of {self.dim} numbers (components, dim)"
            )
        if self.weights and len(self.weights) != self.components:
            raise ValueError(f"weights must hold {self.components} numbers, got {len(self.weights)}")
        if any(weight <= 0 for weight in self.weights):
            raise ValueError("weights must be > 0")


@dataclass(frozen=True)
class DownloadedConfig(CarvedConfig):
    """A standard set, read with torchvision from `root`, downloaded there where allowed."""

    root: str | None = None  # None: $CDM_RUN_DATA, or ~/.cache/cdm-run/data
    download: bool = True
    dequantise: bool = True
    flip: bool = False  # random horizontal flip in training


@dataclass(frozen=True)
class MnistConfig(DownloadedConfig):
    """MNIST, 28x28 grey (LeCun, Cortes and Burges)."""

    pad: int = 0  # black pixels added on every side; 2 makes 32x32

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        super().check()
        if self.pad < 0:
            raise ValueError(f"pad must be at least 0, got {self.pad}")


@dataclass(frozen=True)
class FashionMnistConfig(MnistConfig):
    """Fashion-MNIST, 28x28 grey (Xiao, Rasul and Vollgraf)."""


@dataclass(frozen=True)
class Cifar10Config(DownloadedConfig):
    """CIFAR-10, 32x32 colour (Krizhevsky)."""


@dataclass(frozen=True)
class Cifar100Config(DownloadedConfig):
    """CIFAR-100, 32x32 colour, fine labels (Krizhevsky)."""


@dataclass(frozen=True)
class SvhnConfig(DownloadedConfig):
    """Street View House Numbers, 32x32 colour (Netzer et al.)."""

    extra: bool = False  # train on the 531,131 extra images too (1.6 GB of memory)


@dataclass(frozen=True)
class CelebAConfig:
    """CelebA faces with the crop of the DDIM protocol; its own validation partition is used."""

    root: str | None = None  # None: $CDM_RUN_DATA, or ~/.cache/cdm-run/data
    download: bool = True
    size: int = 64
    attribute: str | None = None  # one of the 40 attributes as a two-class label; None: unlabelled
    dequantise: bool = True
    flip: bool = False

    def check(self) -> None:
        """Raise `ValueError` on a size that the 128x128 crop does not hold."""
        if not 1 <= self.size <= 128:
            raise ValueError(f"size must be between 1 and 128 (the crop is 128x128), got {self.size}")


@dataclass(frozen=True)
class ImageFolderConfig(CarvedConfig):
    """Any tree of images; top-level subfolders are classes, or the splits `train`, `valid` and `test`."""

    root: str = ""
    size: int = 64  # images are cut to a centred square and reduced to this side
    channels: int = 3  # 1: grey, 3: colour; images are converted
    test: float = 0.1  # share of the images, where there is no `test` subfolder
    dequantise: bool = True
    flip: bool = False

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        super().check()
        _check_share("test", self.test)
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {self.channels}")
