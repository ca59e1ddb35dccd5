"""C++ kernels of `cdm_kernels.mean_conv3x3`: x (B, C, H, W) float32, bfloat16 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_kernels.cpp import DTYPES, Kernel
from cdm_kernels.dispatch import dense

_SUMS = Kernel("cdm_window_sums", "i" * 7 + "p" * 2)
_ADJOINT = Kernel("cdm_window_sums_adjoint", "i" * 7 + "p" * 2)


def window_sums(x: Tensor) -> Tensor:
    """(B, C, 9) float32 (float64 of float64): the sums over the window that each tap sees."""
    x, channels_last = dense(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_empty(*x.shape[:2], 9, dtype=dtype)
    _SUMS(*x.shape, channels_last, DTYPES[x.dtype], torch.get_num_threads(), x, sums)
    return sums


def window_sums_adjoint(
    sums: Tensor, height: int, width: int, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """(B, C, height, width) in `dtype`: each pixel the sum over the taps that see it; sums (B, C, 9)."""
    shape = (*sums.shape[:2], height, width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dx = torch.empty(shape, dtype=dtype, device=sums.device, memory_format=layout)
    _ADJOINT(*shape, channels_last, DTYPES[dtype], torch.get_num_threads(), sums.contiguous(), dx)
    return dx
