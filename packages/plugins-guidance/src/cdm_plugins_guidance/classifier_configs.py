"""Settings of the classifiers trained here and of their objective. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ResNetConfig:
    """A residual network for small images, of ReLU and GroupNorm."""

    widths: tuple[int, ...] = (32, 64, 128)  # one a stage; every stage but the first halves the image
    blocks: int = 1  # residual blocks a stage
    norm_groups: int = 8
    dropout: float = 0.0  # of the pooled features

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if not self.widths or self.blocks < 1 or self.norm_groups < 1:
            raise ValueError("widths must hold one width a stage, blocks and norm_groups be at least 1")
        if any(width < 1 or width % self.norm_groups for width in self.widths):
            raise ValueError(f"widths must be multiples of norm_groups {self.norm_groups}, not {self.widths}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    @classmethod
    def small(cls) -> ResNetConfig:
        """A net that tests can afford."""
        return cls(widths=(8, 16), norm_groups=4)


@dataclass(frozen=True)
class ClassificationConfig:
    """Cross-entropy on clean images, or on noisy ones."""

    # Images are noised to one of the classifier's own levels: what makes a classifier know them (ADM-G).
    noisy: bool = False
    shift: int = 1  # images are moved by up to so many pixels in training, their edge repeated
    flip: bool = False  # and mirrored, one in two
    smoothing: float = 0.0  # of the labels

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0, not {self.shift}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), not {self.smoothing}")
