"""C++ kernels of `cdm_kernels.attention`: qkv (B, 3 C, *spatial) float32, bfloat16 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_kernels.cpp import DTYPES, Kernel
from cdm_kernels.dispatch import channels_last, dense, like

_FORWARD = Kernel("cdm_attention", "iiiiii" + "p" * 3)
_BACKWARD = Kernel("cdm_attention_backward", "iiiiii" + "p" * 4)
_DOUBLE_BACKWARD = Kernel("cdm_attention_double_backward", "iiiiii" + "p" * 6)


def _shape(qkv: Tensor, is_channels_last: bool) -> tuple[int, ...]:
    batch, pixels = qkv.shape[0], qkv.shape[2:].numel()
    return batch, qkv.shape[1] // 3, pixels, is_channels_last, DTYPES[qkv.dtype], torch.get_num_threads()


def _values(qkv: Tensor, is_channels_last: bool) -> Tensor:
    """Unwritten (B, C, *spatial) in the layout of qkv."""
    layout = channels_last(qkv.ndim) if is_channels_last else torch.contiguous_format
    shape = (qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:])
    return torch.empty(shape, dtype=qkv.dtype, memory_format=layout)


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, C, *spatial) like qkv, and the weights (B, query, key) in float32 (float64 stays)."""
    qkv, is_channels_last = dense(qkv)
    y = _values(qkv, is_channels_last)
    pixels = qkv.shape[2:].numel()
    weights = qkv.new_empty(len(qkv), pixels, pixels, dtype=torch.promote_types(qkv.dtype, torch.float32))
    _FORWARD(*_shape(qkv, is_channels_last), qkv, y, weights)
    return y, weights


def backward(dy: Tensor, qkv: Tensor, weights: Tensor) -> Tensor:
    """dqkv like qkv."""
    qkv, is_channels_last = dense(qkv)
    dqkv = torch.empty_like(qkv)
    _BACKWARD(*_shape(qkv, is_channels_last), like(dy, is_channels_last), qkv, weights, dqkv)
    return dqkv


def double_backward(cotangent: Tensor, dy: Tensor, qkv: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """ddy (B, C, *spatial) and dqkv, both like qkv; cotangent: of `backward`."""
    qkv, is_channels_last = dense(qkv)
    ddy, dqkv = _values(qkv, is_channels_last), torch.empty_like(qkv)
    tensors = (like(cotangent, is_channels_last), like(dy, is_channels_last), qkv, weights)
    _DOUBLE_BACKWARD(*_shape(qkv, is_channels_last), *tensors, ddy, dqkv)
    return ddy, dqkv
