"""C++ kernels of `cdm_kernels.group_norm_silu`: x (B, C, *spatial) float32, bfloat16 or float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cdm_kernels.cpp import DTYPES, Kernel
from cdm_kernels.dispatch import dense, like

_SHAPE = "i" * 9
_FORWARD = Kernel("cdm_group_norm_silu", _SHAPE + "d" + "p" * 6)
_BACKWARD = Kernel("cdm_group_norm_silu_backward", _SHAPE + "p" * 9)
_DOUBLE_BACKWARD = Kernel("cdm_group_norm_silu_double_backward", _SHAPE + "p" * 13)


def _shape(x: Tensor, weight: Tensor, groups: int, activation: bool, channels_last: bool) -> tuple[Any, ...]:
    batch, channels = x.shape[:2]
    pixels = x.numel() // max(batch * channels, 1)
    flags = (channels_last, activation, weight.ndim == 2)
    return (batch, channels, pixels, groups, *flags, DTYPES[x.dtype], torch.get_num_threads())


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and mean and 1 / std of each group, (B, groups) in the dtype of weight."""
    x, channels_last = dense(x)
    y = torch.empty_like(x)
    mean, rstd = weight.new_empty(x.shape[0], groups), weight.new_empty(x.shape[0], groups)
    shape = _shape(x, weight, groups, activation, channels_last)
    _FORWARD(*shape, eps, x, weight.contiguous(), bias.contiguous(), y, mean, rstd)
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, dweight and dbias like weight."""
    x, channels_last = dense(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    shape = _shape(x, weight, groups, activation, channels_last)
    tensors = (like(dy, channels_last), x, mean, rstd, weight, bias, dx, dweight, dbias)
    _BACKWARD(*shape, *tensors)
    return dx, dweight, dbias


def double_backward(
    v: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ddy and dx like x, dweight and dbias like weight; v, alpha, beta: cotangents of `backward`."""
    x, channels_last = dense(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    outputs = (torch.empty_like(x), torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias))
    shape = _shape(x, weight, groups, activation, channels_last)
    small = (None if part is None else part.contiguous() for part in (alpha, beta))
    tensors = (like(v, channels_last), *small, like(dy, channels_last), x, mean, rstd, weight, bias, *outputs)
    _DOUBLE_BACKWARD(*shape, *tensors)
    return outputs
