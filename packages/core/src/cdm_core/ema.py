"""Exponential moving average of the weights: what is evaluated and sampled from."""

from __future__ import annotations

import copy

import torch
from torch import nn


def decay_at(updates: int, decay: float) -> float:
    """The decay of update number `updates` (0 is the first): min(decay, (1 + n) / (10 + n)).

    The warm start keeps the average from remembering the random initial weights for 1 / (1 - decay) steps.
    """
    return min(decay, (1 + updates) / (10 + updates))


class EMA:
    """`module`: a copy of `model` in evaluation mode whose parameters are the running average.

    Parameters are kept in float32 at least, whatever the precision of the model. Buffers are copied: running
    statistics are averages already, and tables of constants must stay what they are to the last bit.
    """

    def __init__(self, model: nn.Module, decay: float, start: int = 0) -> None:
        self.decay, self.start = decay, start
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in self.module.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model` after optimizer step `step` (0 is the first)."""
        averages = [p.data for p in self.module.parameters()]
        weights = [p.data.to(a.dtype) for p, a in zip(model.parameters(), averages, strict=True)]
        if step < self.start:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - decay_at(step - self.start, self.decay))
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
