"""Settings of how a guide's gradient is applied, and of the recurrent sampler. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["constant", "sine", "linear-sine", "sqrt-noise", "sqrt-signal", "sigma2", "alpha", "beta"]
BY_COUNT = ("constant", "sine", "linear-sine")  # functions of the step's number alone: they can be summed


@dataclass(frozen=True)
class StrengthConfig:
    """How strong at which step: `scale` times a schedule, inside an interval (`strengths`)."""

    scale: float = 1.0  # s; negative: away from the class; 0: unguided, bitwise
    # By the step's number i of N: constant; sine, sin(pi t/N) with t = N-1-i; linear-sine, EluCD's for EDM.
    # By its level: sqrt-noise, sqrt(1-abar); sqrt-signal, sqrt(abar); sigma2. By both: beta; alpha = 1-beta.
    schedule: Schedule = "constant"
    sine: float = 0.3  # linear-sine: share of the sine that is added to the line
    floor: float = 1e-5  # linear-sine: the line, scale included, falls no lower
    start: float = 0.0  # guided from this fraction of the steps on,
    stop: float = 1.0  # up to this one, itself excluded
    sigma_min: float = 0.0  # and only between these noise levels, both included
    sigma_max: float = math.inf
    every: int = 1  # guided at every so manieth step only,
    rescale: bool = True  # then so many times as strongly
    last: bool = True  # guided at the last step too
    halves: Literal["both", "first"] = "both"  # of a Heun step
    # The weights add up to what they add up to over so many steps, however many there are; 0: they do not.
    reference_steps: int = 0

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if not all(map(math.isfinite, (self.scale, self.sine))) or not 0 <= self.floor < math.inf:
            raise ValueError("scale, sine and floor must be finite, floor >= 0")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"need 0 <= start < stop <= 1, not {self.start} and {self.stop}")
        if not 0 <= self.sigma_min <= self.sigma_max:
            raise ValueError(f"need 0 <= sigma_min <= sigma_max, not {self.sigma_min} and {self.sigma_max}")
        if self.every < 1 or self.reference_steps < 0:
            raise ValueError("every must be at least 1 and reference_steps at least 0")
        if self.reference_steps and self.schedule not in BY_COUNT:
            names = ", ".join(BY_COUNT)
            raise ValueError(f"reference_steps goes with the schedules {names}, not {self.schedule!r}")


@dataclass(frozen=True)
class TermConfig(StrengthConfig):
    """One guide at work: where it looks, and by which rule its gradient moves the sample (`apply`)."""

    # x0: the detached prediction (EluCD). x0-through: the same, differentiated through the denoiser
    # (universal guidance, DPS, FreeDoM). x_t: the noisy state, for a classifier that knows the noise level
    # (ADM-G). rms: x / max(1, RMS(x)), for one that does not (EluCD on EDM).
    look: Literal["x0", "x0-through", "x_t", "rms"] = "x0"
    # score: the score moves by s g (DDIM, DPM-Solver, Euler, Heun). mean: the ancestral step's mean (ADM-G,
    # EluCD). shift: the prediction (MPGD). nudge: the state, before the step (EluCD on EDM).
    rule: Literal["score", "mean", "shift", "nudge"] = "score"
    # Look x0, rules score and mean: what stands for the Jacobian dx0/dx that is not computed. vp: I in the
    # variance-preserving state (EluCD); ve: I in x; gaussian: alpha^2 I, exact for N(0, I) data.
    jacobian: Literal["vp", "ve", "gaussian"] = "vp"
    # Rule mean: the variance that multiplies the gradient, whatever the sampler's own is; published methods
    # have the two alike. auto: learned where it is, else small; one: 1, the plain step of FreeDoM and TFG.
    variance: Literal["auto", "small", "large", "one"] = "auto"
    gamma: float = 0.0  # rule mean: gamma sigma2_max sin(pi t/N) is added to that variance (EluCD: 0.3)
    # sigma2_max. first: beta of the first step; official: the running maximum of the first sample's corner
    # pixel, which makes every sample depend on the first and waits for the device at every step.
    peak: Literal["first", "official"] = "first"
    normalise: Literal["none", "rms", "l2"] = "none"  # each sample's gradient to this size 1
    eps: float = 1e-12  # sizes below are taken for this: a vanishing gradient stays zero
    clip: float = math.inf  # then each sample's gradient down to at most this RMS

    def check(self) -> None:
        """Raise `ValueError` on a value out of range, or settings that do not go together."""
        super().check()
        if self.rule == "nudge" and self.look not in ("x_t", "rms"):
            raise ValueError(
                f"rule 'nudge' moves the state before it is denoised: look 'x_t' or 'rms', not {self.look!r}"
            )
        if self.rule != "mean" and (self.gamma or self.variance != "auto" or self.peak != "first"):
            raise ValueError(f"gamma, variance and peak belong to rule 'mean', not {self.rule!r}")
        if not math.isfinite(self.gamma):
            raise ValueError(f"gamma must be finite, not {self.gamma}")
        if not (0 < self.eps < math.inf and self.clip > 0):
            raise ValueError("eps and clip must be above 0")


@dataclass(frozen=True)
class GuidedConfig:
    """Settings of `apply.GuidedDenoiser`: one term a guide, added up."""

    terms: tuple[TermConfig, ...] = (TermConfig(),)
    # Labels go to the denoiser too. None: where it is conditional on as many classes as the guides have.
    condition: bool | None = None

    def check(self) -> None:
        """Raise `ValueError` unless there are terms, each in order."""
        if not self.terms:
            raise ValueError("terms must hold at least one term")
        for term in self.terms:
            term.check()


# The published methods, by name; their scales are those of the paper's main model, to be tuned for any other.
METHODS: Mapping[str, TermConfig] = {
    "elucd": TermConfig(look="x0", rule="mean", gamma=0.3),
    "elucd-official": TermConfig(look="x0", rule="mean", gamma=0.3, peak="official"),
    "elucd-edm": TermConfig(look="rms", rule="nudge", schedule="linear-sine", scale=0.004, normalise="rms"),
    "adm": TermConfig(look="x_t", rule="mean"),
    "adm-ddim": TermConfig(look="x_t", rule="score"),
    "universal": TermConfig(look="x0-through", rule="score"),
    "freedom": TermConfig(look="x0-through", rule="mean", variance="one", schedule="sqrt-signal"),
    "mpgd": TermConfig(look="x0", rule="shift"),
}


@dataclass(frozen=True)
class RecurrentConfig:
    """Settings of `recurrent.recurrent`."""

    repeats: int = 4  # times that each step of the interval is taken; 1: DDIM
    sigma_min: float = 0.0  # steps from levels between these are repeated, both included
    sigma_max: float = math.inf
    eta: float = 0.0  # share of fresh noise of a step: 0 deterministic, 1 ancestral

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")
        if not 0 <= self.sigma_min <= self.sigma_max:
            raise ValueError(f"need 0 <= sigma_min <= sigma_max, not {self.sigma_min} and {self.sigma_max}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {self.eta}")
