"""Convolution beside PyTorch's own: the same forward and backward, another second derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels import conv2d

SHAPES = {  # of x, of the weight, and the padding
    "64x32x16x16 3x3": ((64, 32, 16, 16), (32, 32, 3, 3), (1, 1)),
    "64x64x8x8 3x3": ((64, 64, 8, 8), (64, 64, 3, 3), (1, 1)),
    "64x64x8x8 1x1": ((64, 64, 8, 8), (64, 64, 1, 1), (0, 0)),
    "16x128x32x32 3x3": ((16, 128, 32, 32), (128, 128, 3, 3), (1, 1)),
}
FORMS = {
    "float32": (torch.float32, torch.contiguous_format),
    "float32 channels last": (torch.float32, torch.channels_last),
    "bfloat16 channels last": (torch.bfloat16, torch.channels_last),
}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest entry


def differentiate(function: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, ...]:
    """Gradients of the values and of their gradient in x: once differentiated, both are the same."""
    x, weight, bias, padding, dy, v = inputs
    y = function(x, weight, bias, padding=padding)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    return torch.autograd.grad((y, dx), (x, weight, bias), (dy, v))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SHAPES)
def test_conv2d(side_by_side: Any, size: str, form: str) -> None:
    (image, kernel, padding), (dtype, layout) = SHAPES[size], FORMS[form]
    x, dy, v, weight = (
        torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        for shape in (image, image, image, kernel)
    )
    bias = torch.randn(kernel[0]).to(dtype).requires_grad_()
    inputs = (x.requires_grad_(), weight.requires_grad_(), bias, padding, dy, v)
    side_by_side(
        lambda: differentiate(conv2d, *inputs),
        lambda: differentiate(F.conv2d, *inputs),
    )
    found, expected = (differentiate(function, *inputs) for function in (conv2d, F.conv2d))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCES[dtype] * theirs.abs().max()
