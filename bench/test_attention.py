"""Self-attention of one head beside the products and the softmax that the official code makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm_kernels import attention, first_order

SIZES = {  # (B, C, H, W)
    "64x64x8x8": (64, 64, 8, 8),
    "64x64x4x4": (64, 64, 4, 4),
    "32x64x14x14": (32, 64, 14, 14),
    "16x128x16x16": (16, 128, 16, 16),
}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest entry


def official(qkv: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, 1)
    channels = q.shape[1]
    weights = q.flatten(2).mT @ k.flatten(2) / math.sqrt(channels)
    return (v.flatten(2) @ torch.softmax(weights, 2).mT).unflatten(2, q.shape[2:])


def differentiate(function: Callable[[Tensor], Tensor], qkv: Tensor, *rest: Tensor, order: str) -> Any:
    """forward: the values; backward: their gradient; full: that of values and of their gradient in qkv.

    The first two as sampling asks for them, in `first_order`.
    """
    dy, cotangent = rest
    if order == "forward":
        with torch.no_grad(), first_order():
            return (function(qkv),)
    if order == "backward":
        with first_order():
            return torch.autograd.grad(function(qkv), qkv, dy)
    y = function(qkv)
    (dqkv,) = torch.autograd.grad(y, qkv, dy, create_graph=True)
    return torch.autograd.grad((y, dqkv), qkv, (dy, cotangent))


@pytest.mark.parametrize("order", ["forward", "backward", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_attention(side_by_side: Any, size: str, dtype: torch.dtype, order: str) -> None:
    batch, channels, *pixels = SIZES[size]
    qkv, dy, cotangent = (
        torch.randn(batch, parts * channels, *pixels).to(dtype).to(memory_format=torch.channels_last)
        for parts in (3, 1, 3)
    )
    inputs = (qkv.requires_grad_(), dy, cotangent)
    side_by_side(
        lambda: differentiate(attention, *inputs, order=order),
        lambda: differentiate(official, *inputs, order=order),
    )
    found, expected = (differentiate(each, *inputs, order=order) for each in (attention, official))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCES[dtype] * theirs.abs().max()
