"""Settings of the objective `denoising`, apart from it so that listing it never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DenoisingConfig:
    """The loss of a network that denoises discrete levels; the defaults are those of Ho et al. 2020.

    loss: `mse` the squared error of what the network predicts, with `vlb_weight` of the likelihood bound
    where it has learned its variance (Nichol & Dhariwal 2021, eq. 16); `kl` the bound alone, in bits/dim.
    weight, of the squared error: `none`; `min-snr` (Hang et al. 2023); `p2` (Choi et al. 2022).
    """

    loss: Literal["mse", "kl"] = "mse"
    weight: Literal["none", "min-snr", "p2"] = "none"
    min_snr_gamma: float = 5.0  # SNR beyond which a level counts no more
    p2_gamma: float = 1.0  # how far low noise is discounted; 0: not at all
    p2_k: float = 1.0  # SNR at which the discount sets in
    vlb_weight: float = 0.001  # of the bound in bits per dimension; it moves the variance alone
    fixed_variance: Literal["small", "large"] = "large"  # in `kl`, of a network that has not learned one
    grey_levels: int = 256  # the bound's last step is the probability of one of as many
    label_dropout: float = 0.1  # share trained without their label, where the network has a label for "none"

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if not self.min_snr_gamma > 0 or not self.p2_k > 0:
            raise ValueError(
                f"min_snr_gamma and p2_k must be above 0, not {self.min_snr_gamma} and {self.p2_k}"
            )
        if self.p2_gamma < 0 or self.vlb_weight < 0:
            raise ValueError(
                f"p2_gamma and vlb_weight must be >= 0, not {self.p2_gamma} and {self.vlb_weight}"
            )
        if self.grey_levels < 2:
            raise ValueError(f"grey_levels must be at least 2, not {self.grey_levels}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), not {self.label_dropout}")
