"""Settings of the networks of the library `diffusers`. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass

from cdm_core.diffusers_configs import DiffusersConfig


@dataclass(frozen=True)
class UNet2DConfig(DiffusersConfig):
    """A `UNet2DModel`."""

    # Heads of every attention, whatever its width, as in the ADM of 128 pixels: the class itself knows only a
    # width a head. none: as the architecture has it.
    num_heads: int | None = None

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        super().check()
        if self.num_heads is not None and self.num_heads < 1:
            raise ValueError(
                f"num_heads must be at least 1 (none: as the architecture), not {self.num_heads}"
            )

    @classmethod
    def small(cls) -> UNet2DConfig:
        """A net that tests can afford."""
        net = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 2,
            "block_out_channels": [8, 16],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
        return cls(architecture=json.dumps(net), noise_steps=20)


@dataclass(frozen=True)
class Transformer2DConfig(DiffusersConfig):
    """A `DiTTransformer2DModel`."""

    # As the official DiT computes, whose weights the class holds but does not agree with: time frequencies
    # 10000^(-i / half), not 10000^(-i / (half - 1)), and 1e-6 in every LayerNorm. false: as the class has it.
    official: bool = True
    cfg_channels: int | None = 3  # channels that classifier-free guidance moves, the first ones; none: all

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        super().check()
        if self.schedule == "edm":
            raise ValueError("schedule edm is for a UNet2DModel")
        if self.cfg_channels is not None and self.cfg_channels < 1:
            raise ValueError(f"cfg_channels must be at least 1 (none: all), not {self.cfg_channels}")

    @classmethod
    def small(cls) -> Transformer2DConfig:
        """A net that tests can afford."""
        net = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 2,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_embeds_ada_norm": 10,
        }
        return cls(architecture=json.dumps(net), noise_steps=20)
