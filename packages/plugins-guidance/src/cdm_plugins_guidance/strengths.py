"""How strong guidance is at a step: pure functions of the step, Python floats.

N steps in all, i = 0 .. N - 1 from noise to data, t = N - 1 - i as published code counts; levels sigma and
next in VE units, so that abar = 1 / (1 + sigma^2) on a variance-preserving path. Weights include the scale s.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeVar

from torch import Tensor

from cdm_core.errors import UserError
from cdm_core.samplers import Step
from cdm_plugins_guidance.apply_configs import StrengthConfig

Level = TypeVar("Level", float, Tensor)


def beta(step: Step) -> float:
    """beta_t = 1 - abar_t / abar_next, of the levels visited (Ho et al. 2020)."""
    return (step.sigma**2 - step.next**2) / (1 + step.sigma**2)


def sine(number: int, total: int) -> float:
    """sin(pi t / N): 0 at the last step, 1 half-way (EluCD, arXiv 2310.11311, section 4)."""
    return math.sin(math.pi * (total - 1 - number) / total)


def linear_sine(config: StrengthConfig, number: int, total: int) -> float:
    """max(s (N + 1 - i) / (N + 1), floor) + s a sin(pi i / N): EluCD's weight of a nudge on EDM.

    A negative scale mirrors it.
    """
    line = max(abs(config.scale) * (total + 1 - number) / (total + 1), config.floor)
    return math.copysign(line, config.scale) + config.scale * config.sine * math.sin(math.pi * number / total)


def _by_count(config: StrengthConfig, number: int, total: int) -> float:
    if config.schedule == "linear-sine":
        return linear_sine(config, number, total)
    return config.scale * (sine(number, total) if config.schedule == "sine" else 1.0)


@lru_cache
def invariance(config: StrengthConfig, total: int) -> float:
    """Factor that makes the schedule's weights add up, over N steps, to their sum over `reference_steps`."""
    if not config.reference_steps:
        return 1.0
    reference, own = (
        sum(_by_count(config, i, steps) for i in range(steps)) for steps in (config.reference_steps, total)
    )
    return reference / own if own else 1.0  # a single step of `sine` has no weight to scale


def _by_level(schedule: str, sigma: Level) -> Level:
    signal = 1 / (1 + sigma**2)
    if schedule == "sqrt-signal":
        return signal**0.5
    return sigma**2 if schedule == "sigma2" else sigma * signal**0.5


def weight(config: StrengthConfig, step: Step) -> float:
    """The weight of a step, 0 where it is not guided."""
    if config.scale == 0 or not _guided(config, step):
        return 0.0
    often = config.every if config.rescale else 1
    if config.schedule in ("alpha", "beta"):
        amount = beta(step)
        return often * config.scale * (amount if config.schedule == "beta" else 1 - amount)
    if config.schedule in ("sqrt-noise", "sqrt-signal", "sigma2"):
        return often * config.scale * _by_level(config.schedule, step.level)
    return often * invariance(config, step.total) * _by_count(config, step.number, step.total)


def _guided(config: StrengthConfig, step: Step) -> bool:
    return (
        config.start <= step.number / step.total < config.stop
        and config.sigma_min <= step.level <= config.sigma_max
        and step.number % config.every == 0
        and (config.last or step.next > 0)
        and (config.halves == "both" or not step.correction)
    )


def level_weight(config: StrengthConfig, sigma: Tensor) -> Tensor:
    """The weight at a noise level where no step is known, of the shape of sigma.

    Raises `UserError` where the settings ask for the step.
    """
    asked = {
        f"schedule {config.schedule!r}": config.schedule in ("sine", "linear-sine", "alpha", "beta"),
        "start and stop": (config.start, config.stop) != (0, 1),
        "every": config.every != 1,
        "reference_steps": config.reference_steps != 0,
        "last = false": not config.last,
        "halves = 'first'": config.halves != "both",
    }
    for name, needed in asked.items():
        if needed:
            raise UserError(
                f"{name} of guidance depends on the step: call a sampler of cdm_core.samplers with "
                "Conditional(model, y), not `denoise` by itself"
            )
    inside = ((sigma >= config.sigma_min) & (sigma <= config.sigma_max)).to(sigma.dtype)
    constant = config.schedule == "constant"
    return inside * config.scale * (1.0 if constant else _by_level(config.schedule, sigma))
