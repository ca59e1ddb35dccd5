"""The learning rate as a pure function of the step: nothing to save, nothing that counts processes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cdm_core.errors import UserError
from cdm_core.settings import LRFactor


def factor(step: int, schedule: Iterable[LRFactor], total_steps: int) -> float:
    """The product of the factors of `schedule` at `step` (0 is the first) of `total_steps`."""
    return math.prod(_one(step, part, total_steps) for part in schedule)


def _one(step: int, part: LRFactor, total_steps: int) -> float:
    steps = part.steps or (total_steps if part.kind == "cosine" else 0)
    if steps < 1:
        raise UserError(f"train.lr_schedule: a {part.kind!r} factor needs steps >= 1, got {part.steps}")
    if part.kind == "warmup":
        return min(1.0, (step + 1) / steps)
    if part.kind == "step":
        return part.factor ** (step // steps)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return part.factor + (1 - part.factor) * fall
