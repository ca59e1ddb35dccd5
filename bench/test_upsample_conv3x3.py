"""Upsampling and a 3x3 convolution beside the two, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm_kernels import upsample_conv3x3
from cdm_kernels.upsample_conv3x3 import reference

SHAPES = {"64x64x8x8": (64, 64, 8, 8), "16x128x16x16": (16, 128, 16, 16), "4x256x16x16": (4, 256, 16, 16)}


def differentiate(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the values and of their gradient in x."""
    x, weight, bias, dy, v = inputs
    y = function(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    return torch.autograd.grad((y, dx), (x, weight, bias), (dy, v))


@pytest.mark.parametrize("size", SHAPES)
def test_upsample_conv3x3(side_by_side: Any, size: str) -> None:
    batch, width, height, _ = shape = SHAPES[size]
    large = (batch, width, 2 * height, 2 * height)
    x, v, dy = (torch.randn(s).contiguous(memory_format=torch.channels_last) for s in (shape, shape, large))
    weight, bias = torch.randn(width, width, 3, 3) * 0.1, torch.randn(width)
    inputs = (*(part.requires_grad_() for part in (x, weight, bias)), dy, v)
    side_by_side(lambda: differentiate(upsample_conv3x3, *inputs), lambda: differentiate(reference, *inputs))
    found, expected = (differentiate(function, *inputs) for function in (upsample_conv3x3, reference))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
