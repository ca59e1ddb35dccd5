"""Settings of the EDM networks, under the official field names. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

PrecondName = Literal["edm", "vp", "ve", "iddpm"]
NetName = Literal["SongUNet", "DhariwalUNet"]


@dataclass(frozen=True)
class EDMConfig:
    """A preconditioned network (Karras et al. 2022, table 1); the defaults are those of ImageNet 64x64."""

    precond: PrecondName = "edm"
    model_type: NetName = "DhariwalUNet"  # ADM; SongUNet: DDPM++ or NCSN++
    conditional: bool = False  # class-conditional
    model_channels: int = 192  # base width
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)  # width of each resolution, in base widths
    channel_mult_emb: int = 4  # width of the noise embedding, in base widths
    num_blocks: int = 3  # residual blocks a resolution, one more on the way up
    attn_resolutions: tuple[int, ...] = (32, 16, 8)  # heights with attention, beside the middle
    dropout: float = 0.1
    augment_dim: int = 0  # augmentation labels that it was trained with; zero at sampling
    embedding_type: Literal["positional", "fourier"] = "positional"  # SongUNet only: DDPM++, NCSN++
    channel_mult_noise: int = 1  # SongUNet only: width of the sinusoids, 2 for NCSN++
    encoder_type: Literal["standard", "skip", "residual"] = "standard"  # SongUNet only; residual for NCSN++
    decoder_type: Literal["standard", "skip"] = "standard"  # SongUNet only
    resample_filter: tuple[float, ...] = (1, 1)  # SongUNet only; (1, 3, 3, 1) for NCSN++
    sigma_min: float | None = None  # edm, ve: least noise that the net takes; None: 0 for edm, 0.02 for ve
    sigma_max: float | None = None  # edm, ve: most noise; None: no limit for edm, 100 for ve
    sigma_data: float = 0.5  # edm only: standard deviation of the data
    beta_d: float = 19.9  # vp only: slope of the rate of noise
    beta_min: float = 0.1  # vp only: rate of noise at t = 0
    epsilon_t: float = 1e-5  # vp only: smallest t
    M: int = 1000  # vp, iddpm: training steps
    C_1: float = 0.001  # iddpm only: bound on how much signal a step may take
    C_2: float = 0.008  # iddpm only: offset of the cosine

    @property
    def limits(self) -> tuple[float, float]:
        """Least and most noise that the net takes, for `edm` and `ve`."""
        low, high = (0.02, 100.0) if self.precond == "ve" else (0.0, math.inf)
        return (
            low if self.sigma_min is None else self.sigma_min,
            high if self.sigma_max is None else self.sigma_max,
        )

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        counts = ("model_channels", "channel_mult_emb", "num_blocks", "channel_mult_noise")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.model_channels % 4:
            raise ValueError(f"model_channels must be a multiple of 4, not {self.model_channels}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(
                f"channel_mult must hold one width of at least 1 a resolution, not {self.channel_mult}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.augment_dim < 0:
            raise ValueError(f"augment_dim must be at least 0, not {self.augment_dim}")
        if len(self.resample_filter) % 2 or not sum(self.resample_filter):
            raise ValueError(
                f"resample_filter must be of even length and sum to something, not {self.resample_filter}"
            )
        self._check_build()
        self._check_noise()

    def _check_build(self) -> None:
        own = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")
        for name in own:
            if self.model_type != "SongUNet" and getattr(self, name) != getattr(EDMConfig, name):
                raise ValueError(f"{name} is a setting of SongUNet: a {self.model_type} has none")

    def _check_noise(self) -> None:
        low, high = self.limits
        if not 0 <= low < high:
            raise ValueError(f"need 0 <= sigma_min < sigma_max, not {low} and {high}")
        if self.precond in ("vp", "iddpm") and (self.sigma_min is not None or self.sigma_max is not None):
            raise ValueError(
                f"sigma_min and sigma_max of {self.precond} follow from its schedule: leave them"
            )
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be above 0, not {self.sigma_data}")
        if not (self.beta_d > 0 and self.beta_min > 0 and 0 < self.epsilon_t < 1):
            raise ValueError("beta_d and beta_min must be above 0, and epsilon_t must lie in (0, 1)")
        if self.M < 2 or not 0 < self.C_1 < 1 or not self.C_2 > 0:
            raise ValueError("M must be at least 2, C_1 lie in (0, 1) and C_2 be above 0")

    @classmethod
    def small(cls) -> EDMConfig:
        """A net that tests can afford."""
        return cls(
            conditional=True,
            model_channels=32,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(4,),
            dropout=0.0,
        )


@dataclass(frozen=True)
class EDMObjectiveConfig:
    """Which noise levels are trained, and how much each counts."""

    P_mean: float = -1.2  # of log sigma
    P_std: float = 1.2
    sigma_data: float = 0.5  # standard deviation of the data
    label_dropout: float = 0.1  # share trained without their label, where the network has a label for "none"

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if not (self.P_std > 0 and self.sigma_data > 0 and math.isfinite(self.P_mean)):
            raise ValueError("P_std and sigma_data must be above 0, P_mean finite")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), not {self.label_dropout}")
