"""C++ kernels of `cdm_kernels.softplus`: z of any shape, float32, bfloat16 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_kernels.cpp import DTYPES, Kernel
from cdm_kernels.dispatch import dense, like

_FORWARD = Kernel("cdm_softplus", "iiidpp")
_BACKWARD = Kernel("cdm_softplus_backward", "iiidppp")


def forward(z: Tensor, beta: float) -> Tensor:
    """y in the dtype of z, and in its layout where that is contiguous or channels last."""
    z = dense(z)[0]
    y = torch.empty_like(z)
    _FORWARD(z.numel(), DTYPES[z.dtype], torch.get_num_threads(), beta, z, y)
    return y


def backward(dy: Tensor, z: Tensor, beta: float) -> Tensor:
    """dz like z; dy of z's shape and dtype."""
    z, is_channels_last = dense(z)
    dy, dz = like(dy, is_channels_last), torch.empty_like(z)
    _BACKWARD(z.numel(), DTYPES[z.dtype], torch.get_num_threads(), beta, dy, z, dz)
    return dz
