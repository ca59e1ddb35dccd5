"""The precision rule that all operators share: at least float32 inside, whatever comes in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return x.to(torch.float32)
