"""Concatenation along channels whose derivatives are a split and, again, a concatenation.

PyTorch's gradient of a concatenation is a set of views, whose own gradients are padded with zeros to full
size and added up: four passes over the skips of a U-Net where one will do, and views that every convolution
copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cdm_kernels.dispatch import channels_last, has_kernel, is_channels_last


def concatenate(*tensors: Tensor) -> Tensor:
    """`torch.cat(tensors, 1)`: (B, C_i, *spatial) each -> (B, sum C_i, *spatial).

    Derivatives of every order.
    """
    if torch.compiler.is_compiling() or not has_kernel(tensors[0], composite=True):
        return reference(*tensors)
    return _Concatenate.apply(*tensors)


def reference(*tensors: Tensor) -> Tensor:
    """`concatenate` by PyTorch's own derivatives."""
    return torch.cat(tensors, 1)


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.widths = [tensor.shape[1] for tensor in tensors]
        return reference(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Split.apply(dy, ctx.widths)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, widths: list[int]) -> Any:
        layout = channels_last(dy.ndim) if is_channels_last(dy) else torch.contiguous_format
        return tuple(part.clone(memory_format=layout) for part in dy.split(widths, 1))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return _Concatenate.apply(*cotangents), None
