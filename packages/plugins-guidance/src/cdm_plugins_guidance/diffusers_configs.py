"""Settings of the networks of the library `diffusers`. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

Prediction = Literal["epsilon", "sample", "v_prediction"]
Schedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained", "edm"]


@dataclass(frozen=True)
class DiffusersConfig:
    """A network of diffusers and what its scheduler says of the noise that it was trained on.

    Names and values are the library's. schedule: `trained` are the numbers `betas`, `edm` the preconditioning
    of Karras et al. 2022 with `sigma_data`, for any noise from `sigma_min` to `sigma_max`.
    """

    architecture: str = ""  # its config.json, as text
    prediction: Prediction = "epsilon"
    schedule: Schedule = "linear"
    noise_steps: int = 1000  # T
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: tuple[float, ...] = ()
    zero_snr: bool = False  # betas rescaled so that the last level is pure noise
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    autoencoder: str = ""  # folder of the diffusers autoencoder whose latents are denoised; "": none
    latent_scale: float | None = None  # the latents' factor; none: as the autoencoder's config has it
    checkpoint_decoder: bool = False  # gradients through the autoencoder recompute its activations

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
        if self.noise_steps < 2:
            raise ValueError(f"noise_steps must be at least 2, not {self.noise_steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start and beta_end: need 0 < {self.beta_start} <= {self.beta_end} < 1")
        if (self.schedule == "trained") != bool(self.betas) or not all(0 < beta < 1 for beta in self.betas):
            raise ValueError("betas must be numbers between 0 and 1 where schedule is trained, else none")
        if not (self.sigma_data > 0 and 0 < self.sigma_min < self.sigma_max):
            raise ValueError("sigma_data must be above 0, and sigma_max above sigma_min above 0")


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
