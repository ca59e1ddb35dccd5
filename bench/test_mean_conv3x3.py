"""Mean of a 3x3 convolution beside the convolution and its mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels import mean_conv3x3

SHAPES = {  # of x, and the width
    "16x128x32x32 256": ((16, 128, 32, 32), 256),
    "64x64x16x16 64": ((64, 64, 16, 16), 64),
    "64x32x8x8 64": ((64, 32, 8, 8), 64),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def textbook(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1).mean((2, 3))


def differentiate(function: Callable[..., Tensor], *inputs: Tensor, order: str) -> tuple[Tensor, ...]:
    """forward: the values; backward: their gradients; full: those of values and of their gradient in x."""
    x, weight, bias, dy, v = inputs
    if order == "forward":
        with torch.no_grad():
            return (function(x, weight, bias),)
    y = function(x, weight, bias)
    if order == "backward":
        return torch.autograd.grad(y, (x, weight, bias), dy)
    (dx,) = torch.autograd.grad(y.square(), x, dy, create_graph=True)
    return torch.autograd.grad((y, dx), (x, weight, bias), (dy, v))


@pytest.mark.parametrize("order", ["forward", "backward", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SHAPES)
def test_mean_conv3x3(side_by_side: Any, size: str, layout: str, order: str) -> None:
    shape, width = SHAPES[size]
    x, v = (torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    weight, bias = torch.randn(width, shape[1], 3, 3) * 0.1, torch.randn(width)
    leaves = (part.requires_grad_() for part in (x, weight, bias))
    inputs = (*leaves, torch.randn(shape[0], width), v)
    side_by_side(
        lambda: differentiate(mean_conv3x3, *inputs, order=order),
        lambda: differentiate(textbook, *inputs, order=order),
    )
    found, expected = (differentiate(function, *inputs, order=order) for function in (mean_conv3x3, textbook))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
