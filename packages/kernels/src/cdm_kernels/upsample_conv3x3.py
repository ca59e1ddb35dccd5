"""Nearest-neighbour upsampling by 2 and a 3x3 convolution, as one 2x2 convolution at the low resolution.

Of the nine pixels that a 3x3 window sees in the upsampled image at most four are different: an even row 2h
sees row h - 1 once and row h twice, an odd row 2h + 1 row h twice and row h + 1 once. With

    A_0 = [[1, 0, 0], [0, 1, 1]]    A_1 = [[1, 1, 0], [0, 0, 1]]

the outputs at (2h + i, 2w + j) are a convolution of the small image with the 2x2 kernel A_i weight A_j^T, at
(h + i, w + j) of its (H + 1, W + 1) places. Exact, 16 products instead of 36 a pixel, and no upsampled image.
The places of each parity are read out by a linear map whose derivative is its adjoint: derivatives of any
order.
"""

from __future__ import annotations

from itertools import product as pairs
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels.conv2d import conv2d
from cdm_kernels.dispatch import channels_last, has_kernel, is_channels_last, traced
from cdm_kernels.product import product

_PARITIES = list(pairs((0, 1), (0, 1)))  # i, j in the order of the 2x2 convolution's blocks of channels
_SMALL = 200_000  # elements of x below which the detour costs more than it saves


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1), autocast included.

    x (B, C, H, W), any float dtype; weight (D, C, 3, 3), bias (D,) or None. Returns (B, D, 2H, 2W) in the
    dtype that `conv2d` gives and x's layout.
    """
    if not has_kernel(x):
        return reference(x, weight, bias)
    if x.numel() < _SMALL:
        return conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=(1, 1))
    four = product(weight.flatten(2).flatten(0, 1), _sums(weight)).view(*weight.shape[:2], 2, 2, 2, 2)
    four = four.permute(2, 3, 0, 1, 4, 5).flatten(0, 2)  # (4 D, C, 2, 2)
    y = conv2d(x, four, None if bias is None else bias.repeat(4), padding=(1, 1))
    return _interleaved(y) if traced(y) else _Interleave.apply(y)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`upsample_conv3x3` at the high resolution, in plain PyTorch."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def _sums(weight: Tensor) -> Tensor:
    """(9, 16): from the taps of a 3x3 kernel to those of its four 2x2 kernels, (i, j, row, column)."""
    # A_i[a, u] = ((u > i) == a), made on the device: a copy from the host would wait for it.
    i, row = (
        torch.arange(2, device=weight.device)[:, None, None],
        torch.arange(2, device=weight.device)[:, None],
    )
    a = ((torch.arange(3, device=weight.device) > i) == (row > 0)).to(weight.dtype)
    return torch.einsum("iau,jbv->uvijab", a, a).reshape(9, 16)


def _interleaved(y: Tensor) -> Tensor:
    """(B, 4 D, H + 1, W + 1) -> (B, D, 2 H, 2 W): every parity's places, in operators that a tracer knows."""
    rows, columns = y.shape[2] - 1, y.shape[3] - 1
    blocks = y.permute(0, 2, 3, 1).unflatten(3, (4, -1))
    parts = [blocks[:, i : i + rows, j : j + columns, 2 * i + j] for i, j in _PARITIES]
    lines = [torch.stack(parts[2 * i : 2 * i + 2], 3) for i in (0, 1)]  # (B, H, W, 2, D)
    return torch.stack(lines, 2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _places(y: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each parity, where it is in y (B, 4 D, H + 1, W + 1) and in out (B, D, 2 H, 2 W)."""
    width, rows, columns = out.shape[1], y.shape[2] - 1, y.shape[3] - 1
    blocks = y.split(width, 1)
    return [
        (blocks[2 * i + j][:, :, i : i + rows, j : j + columns], out[:, :, i::2, j::2]) for i, j in _PARITIES
    ]


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Unwritten, in the layout of `like`."""
    layout = channels_last(4) if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


class _Interleave(torch.autograd.Function):
    """`_interleaved` in one pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        batch, width, rows, columns = y.shape
        out = _empty(y, batch, width // 4, 2 * rows - 2, 2 * columns - 2)
        for source, target in _places(y, out):
            target.copy_(source)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return _Separate.apply(dout)


class _Separate(torch.autograd.Function):
    """The adjoint: zeros at the places that a parity does not read."""

    @staticmethod
    def forward(ctx: Any, dout: Tensor) -> Tensor:
        batch, width, rows, columns = dout.shape
        y = _empty(dout, batch, 4 * width, rows // 2 + 1, columns // 2 + 1).zero_()
        for target, source in _places(y, dout):
            target.copy_(source)
        return y

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return _Interleave.apply(v)
