"""Settings of the diffusion transformer. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Size = Literal["S", "B", "L", "XL"]


class Shape(NamedTuple):
    """What a size stands for: transformer blocks, their width, their attention heads."""

    depth: int
    hidden_size: int
    num_heads: int


# Peebles & Xie 2023, table 1; every size comes with patches of 2, 4 and 8.
SIZES: dict[Size, Shape] = {
    "S": Shape(12, 384, 6),
    "B": Shape(12, 768, 12),
    "L": Shape(24, 1024, 16),
    "XL": Shape(28, 1152, 16),
}


@dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer; the defaults are those of DiT-XL/2 on latents of ImageNet."""

    size: Size = "XL"  # depth, width and heads, where they are not given
    patch_size: int = 2  # pixels, or latents, a side of what becomes one token
    depth: int | None = None  # transformer blocks; none: as `size` has it
    hidden_size: int | None = None  # width; none: as `size` has it
    num_heads: int | None = None  # of the attention; none: as `size` has it
    mlp_ratio: float = 4.0  # hidden width of the blocks' perceptrons, in widths
    null_class: bool = True  # one more class for "no label"
    learn_sigma: bool = True  # the variance of an ancestral step is a second half of the output channels
    noise_steps: int = 1000  # T
    beta_start: float = 1e-4  # of DDPM's linear variance schedule
    beta_end: float = 0.02
    cfg_channels: int | None = 3  # channels that classifier-free guidance moves, the first ones; none: all
    autoencoder: str = (
        ""  # folder of the diffusers autoencoder whose latents are denoised; "": pixels, or none
    )
    latent_scale: float | None = None  # the latents' factor; none: as the autoencoder's config has it
    checkpoint_decoder: bool = False  # gradients through the autoencoder recompute its activations

    @property
    def shape(self) -> Shape:
        """Depth, width and heads."""
        given = (self.depth, self.hidden_size, self.num_heads)
        return Shape(*(b if a is None else a for a, b in zip(given, SIZES[self.size], strict=True)))

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        for name, value in {"patch_size": self.patch_size, **self.shape._asdict()}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        _, width, heads = self.shape
        if width % heads or width % 4:
            raise ValueError(f"hidden_size {width} must be a multiple of 4 and of num_heads {heads}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be above 0, not {self.mlp_ratio}")
        if self.noise_steps < 2:
            raise ValueError(f"noise_steps must be at least 2, not {self.noise_steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start and beta_end: need 0 < {self.beta_start} <= {self.beta_end} < 1")
        if self.cfg_channels is not None and self.cfg_channels < 1:
            raise ValueError(f"cfg_channels must be at least 1 (none: all), not {self.cfg_channels}")
        if self.latent_scale is not None and not self.latent_scale > 0:
            raise ValueError(f"latent_scale must be above 0, not {self.latent_scale}")

    @classmethod
    def small(cls) -> DiTConfig:
        """A net that tests can afford."""
        return cls(depth=2, hidden_size=16, num_heads=2, noise_steps=20)
