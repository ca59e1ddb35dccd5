"""C++ kernel of `cdm_kernels.conv2d`: what a 1x1 convolution's gradients have of a sum over all pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_kernels.cpp import Kernel

_PIXEL_PRODUCT = Kernel("cdm_pixel_product", "iiiipppp")
LANES = 16  # x's channels must be a multiple


def pixel_product(dy: Tensor, x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """dweight (D, C, 1, 1), dbias (D,) or None; x (B, C, H, W), dy (B, D, H, W) float32, channels last."""
    outputs, inputs = dy.shape[1], x.shape[1]
    dweight, dbias = x.new_empty(outputs, inputs, 1, 1), x.new_empty(outputs) if with_bias else None
    pixels = x.numel() // inputs
    _PIXEL_PRODUCT(pixels, outputs, inputs, torch.get_num_threads(), dy, x, dweight, dbias)
    return dweight, dbias
