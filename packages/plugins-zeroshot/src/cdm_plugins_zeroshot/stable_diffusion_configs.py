"""Settings of Stable Diffusion as a classifier. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass

from cdm_core.diffusers_configs import DiffusersConfig, Schedule


@dataclass(frozen=True)
class StableDiffusionConfig(DiffusersConfig):
    """`zeroshot/stable-diffusion`: the U-Net (a UNet2DConditionModel), and the prompts of every class.

    `cdm-run convert` fills it from a folder of diffusers.
    """

    prompts: tuple[tuple[str, ...], ...] = ()  # of every class, at least one
    tokens: int = 77  # of a prompt, as its text encoder pads it
    schedule: Schedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        super().check()
        empty = [number for number, prompts in enumerate(self.prompts) if not prompts]
        if empty:
            raise ValueError(f"prompts: class {empty[0]} has none")
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")
        if self.schedule == "edm":
            raise ValueError("schedule must be one of DDPM's family, not edm")

    @classmethod
    def small(cls) -> StableDiffusionConfig:
        """A net that tests can afford: ten classes, the first of two prompts."""
        net = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": [8, 16],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
        }
        prompts = (
            ("zero", "nought"),
            *((name,) for name in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]),
        )
        return cls(architecture=json.dumps(net), prompts=prompts, tokens=5, noise_steps=20)
