"""GroupNorm and SiLU beside PyTorch: `official`, F.group_norm and h * sigmoid(h), and `silu`, with F.silu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels import first_order, group_norm_silu

SHAPES = {  # and groups
    "128x64x14x14/8": ((128, 64, 14, 14), 8),
    "32x128x32x32/32": ((32, 128, 32, 32), 32),
    "32x128x32x32/8": ((32, 128, 32, 32), 8),
    "64x64x16x16/8": ((64, 64, 16, 16), 8),
    "64x32x8x8/8": ((64, 32, 8, 8), 8),
    "64x64x4x4/8": ((64, 64, 4, 4), 8),
    "64x64x2x2/8": ((64, 64, 2, 2), 8),
}
FORMS = {
    "float32": (torch.float32, torch.contiguous_format),
    "float32 channels last": (torch.float32, torch.channels_last),
    "bfloat16 channels last": (torch.bfloat16, torch.channels_last),
}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest entry


def official(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    h = F.group_norm(x, groups, weight, bias, eps)
    return h * torch.sigmoid(h)


def silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def differentiate(function: Callable[..., Tensor], x: Tensor, *rest: Any, order: str) -> tuple[Tensor, ...]:
    """forward: the values; backward: their gradients; full: those of values and of their gradient in x.

    The first two as sampling asks for them, in `first_order`.
    """
    groups, weight, bias, dy, v = rest
    if order == "forward":
        with torch.no_grad(), first_order():
            return (function(x, groups, weight, bias, 1e-5),)
    if order == "backward":
        with first_order():
            return torch.autograd.grad(function(x, groups, weight, bias, 1e-5), (x, weight, bias), dy)
    y = function(x, groups, weight, bias, 1e-5)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    return torch.autograd.grad((y, dx), (x, weight, bias), (dy, v))


@pytest.mark.parametrize(
    ("order", "baseline"),
    [("forward", official), ("backward", official), ("full", official), ("full", silu)],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SHAPES)
def test_group_norm_silu(side_by_side: Any, size: str, form: str, order: str, baseline: Any) -> None:
    (shape, groups), (dtype, layout) = SHAPES[size], FORMS[form]
    x, dy, v = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    weight, bias = torch.randn(shape[1], requires_grad=True), torch.randn(shape[1], requires_grad=True)
    inputs = (x.requires_grad_(), groups, weight, bias, dy, v)
    side_by_side(
        lambda: differentiate(group_norm_silu, *inputs, order=order),
        lambda: differentiate(baseline, *inputs, order=order),
    )
    found, expected = (
        differentiate(function, *inputs, order=order) for function in (group_norm_silu, baseline)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCES[dtype] * theirs.abs().max()
