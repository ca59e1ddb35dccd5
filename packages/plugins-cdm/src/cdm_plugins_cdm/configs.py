"""Settings of the models and of the objective, under the official field names. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PathName = Literal["linear", "cosine", "uniform", "ot", "ot_official"]


@dataclass(frozen=True)
class ClassifierConfig:
    """What every noise-level classifier has: a path of noise levels, and classes or not.

    path: `linear` DDPM's variance schedule, `cosine`, `uniform` sigma_t = t / (T + 1), `ot` the straight
    path, `ot_official` that path as the official code has it (level 0 pure noise, the last one `sigma_min`).
    """

    conditional: bool = False  # class-conditional, with one more class for "no label"
    path: PathName = "linear"
    noise_steps: int = 1000  # T; the classifier tells T + 2 levels apart (ot: T + 1, ot_official: T)
    beta_start: float = 1e-4  # linear path only
    beta_end: float = 0.02  # linear path only
    sigma_min: float = 1e-4  # ot_official only

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if self.noise_steps < 2:
            raise ValueError(f"noise_steps must be at least 2, not {self.noise_steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"need 0 < beta_start <= beta_end < 1, not {self.beta_start} and {self.beta_end}"
            )
        if not 0 < self.sigma_min < 1:
            raise ValueError(f"sigma_min must lie in (0, 1), not {self.sigma_min}")


@dataclass(frozen=True)
class UNetConfig(ClassifierConfig):
    """The official U-Net; the defaults are those of CIFAR-10."""

    channels: int = 128  # base width
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)  # width of each resolution, in base widths
    num_res_blocks: int = 2  # a resolution, one more on the way up
    attn_resolutions: tuple[int, ...] = (16,)  # heights with attention, beside the middle
    norm_groups: int = 32  # of every GroupNorm; a group of one channel would erase what a class adds to it
    dropout: float = 0.1
    resamp_with_conv: bool = True  # False: average pooling down, repetition up
    decoder: bool = True  # False: the way down and the middle only

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        super().check()
        if self.channels < 1 or self.num_res_blocks < 1:
            raise ValueError("channels and num_res_blocks must be at least 1")
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise ValueError(f"ch_mult must hold one width of at least 1 a resolution, not {self.ch_mult}")
        if self.norm_groups < 1 or self.channels % self.norm_groups:
            raise ValueError(f"norm_groups must divide channels {self.channels}, not be {self.norm_groups}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    @classmethod
    def small(cls) -> UNetConfig:
        """A net that tests can afford."""
        return cls(
            channels=8,
            ch_mult=(1, 2),
            num_res_blocks=1,
            attn_resolutions=(4,),
            norm_groups=2,
            dropout=0.0,
            noise_steps=20,
        )


@dataclass(frozen=True)
class MLPConfig(ClassifierConfig):
    """A residual perceptron, for points of shape (d, 1, 1)."""

    width: int = 64
    depth: int = 3  # residual blocks
    gain: float = 4.0  # of the first layer's initial weights: the finer the density, the larger

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        super().check()
        if self.width < 1 or self.depth < 1:
            raise ValueError("width and depth must be at least 1")
        if not self.gain > 0:
            raise ValueError(f"gain must be above 0, not {self.gain}")

    @classmethod
    def small(cls) -> MLPConfig:
        """A net that tests can afford."""
        return cls(width=16, depth=1, noise_steps=20)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the two losses: `w_mse = 0` is cross-entropy only, `w_ce = 0` denoising only."""

    w_ce: float = 0.001
    w_mse: float = 1.0
    label_dropout: float = 0.1  # share of a conditional model's images that are trained without their label

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if self.w_ce < 0 or self.w_mse < 0 or self.w_ce + self.w_mse == 0:
            raise ValueError(f"w_ce and w_mse must be >= 0 and not both 0, not {self.w_ce} and {self.w_mse}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), not {self.label_dropout}")
