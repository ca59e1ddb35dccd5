"""Settings of sampling by moved representations. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RepresentationConfig:
    """The defaults are those of the released code, for a network that predicts eps (`adapter`)."""

    scale: float = 1000.0  # alpha (`sampling_lr`); 0: not steered, bitwise
    # What is differentiated: head, log p(y | z), by the head on the very representations that are moved;
    # decoder, log p(y | x0) of what is decoded from them, which is right for every kind of network.
    through: Literal["head", "decoder"] = "head"
    # Through the head: against the gradient of log p(y | z) (official, + dCE/dz) or along it (paper). auto:
    # against it where the network predicts eps, along it where it predicts x0; a v network is refused.
    sign: Literal["auto", "official", "paper"] = "auto"
    # Which noise level the head is told: own, that of x; clean, none, for one that was trained on clean
    # images alone. Through the decoder it is always clean.
    head_level: Literal["own", "clean"] = "own"
    # By the noise level: constant; sqrt-noise, sigma_t of the path, sqrt(1 - abar); sqrt-signal, sqrt(abar).
    schedule: Literal["constant", "sqrt-noise", "sqrt-signal"] = "constant"
    sigma_min: float = 0.0  # steered only between these noise levels, VE units, both included
    sigma_max: float = math.inf
    # Times `scale`, of the maps of each resolution, the finest first; (): 1 each.
    resolutions: tuple[float, ...] = ()
    normalise: Literal["none", "rms"] = "none"  # each sample's gradient, over all its maps, to an RMS of 1
    # Moves a step, each from where the last one left the maps; from the second on, maps are independent.
    moves: int = 1

    def check(self) -> None:
        """Raise `ValueError` on a value out of range, or settings that do not go together."""
        if not all(map(math.isfinite, (self.scale, *self.resolutions))):
            raise ValueError("scale and resolutions must be finite")
        if not 0 <= self.sigma_min <= self.sigma_max:
            raise ValueError(f"need 0 <= sigma_min <= sigma_max, not {self.sigma_min} and {self.sigma_max}")
        if self.moves < 1:
            raise ValueError(f"moves must be at least 1, not {self.moves}")
        if self.through == "decoder" and (self.sign != "auto" or self.head_level != "own"):
            raise ValueError("through the decoder there is one right sign and one level: leave both out")


@dataclass(frozen=True)
class ThroughDecoderConfig(RepresentationConfig):
    """The same through the decoder; scale and schedule are those of the follow-up's released code."""

    scale: float = 10.0
    through: Literal["head", "decoder"] = "decoder"
    schedule: Literal["constant", "sqrt-noise", "sqrt-signal"] = "sqrt-noise"
