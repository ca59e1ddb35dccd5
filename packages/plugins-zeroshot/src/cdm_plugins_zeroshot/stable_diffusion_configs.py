"""Settings of Stable Diffusion as a classifier. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class StableDiffusionConfig:
    """`zeroshot/stable-diffusion`: the U-Net, the prompts of every class, and the noise it was trained on.

    `cdm-run convert` fills it from a folder of diffusers. Names and values are that library's.
    """

    architecture: str = ""  # config.json of a UNet2DConditionModel, as text
    prompts: tuple[tuple[str, ...], ...] = ()  # of every class, at least one
    tokens: int = 77  # of a prompt, as its text encoder pads it
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    noise_steps: int = 1000  # T
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_snr: bool = False  # betas rescaled so that the last level is pure noise
    autoencoder: str = ""  # folder of the AutoencoderKL whose latents are denoised; "": none
    latent_scale: float = 0.18215  # what latents are multiplied by

    @property
    def settings(self) -> dict[str, Any]:
        """The architecture's settings by name."""
        table: dict[str, Any] = json.loads(self.architecture)
        return table

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        try:
            good = not self.architecture or isinstance(self.settings, dict)
        except ValueError:
            good = False
        if not good:
            raise ValueError("architecture must be the text of a config.json of diffusers")
        empty = [number for number, prompts in enumerate(self.prompts) if not prompts]
        if empty:
            raise ValueError(f"prompts: class {empty[0]} has none")
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")
        if self.noise_steps < 2:
            raise ValueError(f"noise_steps must be at least 2, not {self.noise_steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start and beta_end: need 0 < {self.beta_start} <= {self.beta_end} < 1")
        if not self.latent_scale > 0:
            raise ValueError(f"latent_scale must be above 0, not {self.latent_scale}")

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
        return cls(json.dumps(net), prompts, tokens=5, noise_steps=20)
