"""Settings of ADM's networks, and of the released ones. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cdm_core.backbones.adm_configs import ADMConfig, Pool


@dataclass(frozen=True)
class ProcessConfig(ADMConfig):
    """The network, and the noise levels that it was trained on."""

    noise_schedule: Literal["linear", "cosine"] = "cosine"
    diffusion_steps: int = 1000  # T
    beta_start: float = 1e-4  # linear only, of 1000 steps: T steps have 1000 / T times as much
    beta_end: float = 0.02  # linear only, likewise

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        super().check()
        if self.diffusion_steps < 2:
            raise ValueError(f"diffusion_steps must be at least 2, not {self.diffusion_steps}")
        scale = 1000 / self.diffusion_steps
        if self.noise_schedule == "linear" and not 0 < self.beta_start <= self.beta_end < 1 / scale:
            raise ValueError(
                f"need 0 < beta_start <= beta_end < diffusion_steps / 1000, not {self.beta_start} and "
                f"{self.beta_end}"
            )


@dataclass(frozen=True)
class UNetConfig(ProcessConfig):
    """`guidance/adm`: the denoising U-Net."""

    class_cond: bool = False  # class-conditional
    null_class: bool = False  # one more class for "no label", which the released networks lack
    predicts: Literal["eps", "x0", "v"] = "eps"
    learn_sigma: bool = True  # the variance of the ancestral step is learned
    timestep_respacing: str = ""  # levels that it is sampled at: "250", "10,15,20", "ddim50"; "": all

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        super().check()
        if self.null_class and not self.class_cond:
            raise ValueError("null_class needs class_cond")

    @classmethod
    def small(cls) -> UNetConfig:
        """A net that tests can afford."""
        return cls(**_SMALL, class_cond=True, null_class=True)


@dataclass(frozen=True)
class ClassifierConfig(ProcessConfig):
    """`guidance/noisy-classifier`: the encoder with a pool."""

    model_channels: int = 128  # base width
    num_res_blocks: int = 4  # a resolution
    use_new_attention_order: bool = False  # q, k and v apart, then heads; False: heads, then q, k and v
    dropout: float = 0.0
    pool: Pool = "attention"  # see `cdm_core.backbones.adm.EncoderUNet`

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        super().check()
        if self.pool == "attention" and self.num_head_channels == -1:
            raise ValueError("the pool 'attention' needs num_head_channels")

    @classmethod
    def small(cls) -> ClassifierConfig:
        """A net that tests can afford."""
        return cls(**_SMALL)


_SMALL: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_head_channels": 16,
    "dropout": 0.0,
    "diffusion_steps": 20,
}

# -- the released networks (Dhariwal & Nichol 2021, appendix I) ----------------------------------------------

_MULT: dict[int, tuple[float, ...]] = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def _common(size: int) -> dict[str, Any]:
    """What the network and the classifier of one image size share: attention at heights 32, 16 and 8."""
    return {
        "channel_mult": _MULT[size],
        "attention_resolutions": tuple(size // height for height in (32, 16, 8)),
        "noise_schedule": "cosine" if size == 64 else "linear",
    }


def _unet(size: int, **changes: Any) -> dict[str, Any]:
    base = {
        "model_channels": 256,
        "num_res_blocks": 2,
        "num_head_channels": 64,
        "use_new_attention_order": False,
        "dropout": 0.0,
        "class_cond": True,
    }
    return _common(size) | base | changes


def _classifier(size: int) -> dict[str, Any]:
    return _common(size) | {"num_res_blocks": 4 if size == 64 else 2}


# File name without its suffix -> (image size, settings).
PUBLISHED_UNETS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "64x64_diffusion": (
        64,
        _unet(64, model_channels=192, num_res_blocks=3, use_new_attention_order=True, dropout=0.1),
    ),
    "128x128_diffusion": (128, _unet(128, num_heads=4, num_head_channels=-1)),
    "256x256_diffusion": (256, _unet(256)),
    "256x256_diffusion_uncond": (256, _unet(256, class_cond=False)),
    "512x512_diffusion": (512, _unet(512)),
}
PUBLISHED_CLASSIFIERS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    f"{size}x{size}_classifier": (size, _classifier(size)) for size in _MULT
}
