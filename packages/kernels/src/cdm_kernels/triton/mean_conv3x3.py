"""Triton kernels of `cdm_kernels.mean_conv3x3`: x (B, C, H, W) float32, float16 or bfloat16, of any strides.

One program takes some channels of one image and walks over them in tiles of (rows, columns, channels). Rows
are summed first, then columns; what a tap does not see is left out of its sum, not subtracted from it.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024
_WARPS = 4


@triton.jit
def _channels(channels, BLOCK_C: tl.constexpr):
    """This program's image, its channels along the last of three axes, and which of them exist."""
    per_image = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // per_image).to(tl.int64)
    channel = tl.program_id(0) % per_image * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    return image, channel.to(tl.int64), channel < channels


@triton.jit
def _read(at, mask):
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_columns(s0, s1, s2, rows, column, width):
    """Three sums over columns, with those of a tile's rows (1, columns, channels) added."""
    s0 += tl.sum(tl.where(column < width - 1, rows, 0.0), 1, keep_dims=True)
    s1 += tl.sum(rows, 1, keep_dims=True)
    s2 += tl.sum(tl.where(column > 0, rows, 0.0), 1, keep_dims=True)
    return s0, s1, s2


@triton.jit
def _window_sums(
    x,
    sums,
    channels,
    height,
    width,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, channel, there = _channels(channels, BLOCK_C)
    start = x + image * image_stride + channel * channel_stride
    to = sums + (image * channels + channel) * 9
    nothing = tl.zeros((1, 1, BLOCK_C), tl.float32)
    s00, s01, s02 = nothing, nothing, nothing
    s10, s11, s12 = nothing, nothing, nothing
    s20, s21, s22 = nothing, nothing, nothing
    for left in range(0, width, BLOCK_W):
        column = left + tl.arange(0, BLOCK_W)[None, :, None]
        at = start + column.to(tl.int64) * column_stride
        mask = there & (column < width)
        inner = tl.zeros((BLOCK_H, BLOCK_W, BLOCK_C), tl.float32)
        for top in range(1, height - 1, BLOCK_H):
            row = top + tl.arange(0, BLOCK_H)[:, None, None]
            inner += _read(at + row.to(tl.int64) * row_stride, mask & (row < height - 1))
        middle = tl.sum(inner, 0, keep_dims=True)
        first = _read(at, mask)
        last = _read(at + tl.cast(height - 1, tl.int64) * row_stride, mask & (height > 1))
        above = tl.where(height > 1, first + middle, 0.0)  # the only row of an image is tap 1's alone
        s00, s01, s02 = _add_columns(s00, s01, s02, above, column, width)
        s10, s11, s12 = _add_columns(s10, s11, s12, first + middle + last, column, width)
        s20, s21, s22 = _add_columns(s20, s21, s22, middle + last, column, width)
    tl.store(to, s00, mask=there)
    tl.store(to + 1, s01, mask=there)
    tl.store(to + 2, s02, mask=there)
    tl.store(to + 3, s10, mask=there)
    tl.store(to + 4, s11, mask=there)
    tl.store(to + 5, s12, mask=there)
    tl.store(to + 6, s20, mask=there)
    tl.store(to + 7, s21, mask=there)
    tl.store(to + 8, s22, mask=there)


@triton.jit
def _across(at, there, column, width):
    """What a pixel of each column gets from one row of taps (1, columns, channels)."""
    before = tl.where(column < width - 1, _read(at, there), 0.0)
    after = tl.where(column > 0, _read(at + 2, there), 0.0)
    return before + _read(at + 1, there) + after


@triton.jit
def _adjoint(
    sums,
    dx,
    channels,
    height,
    width,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, channel, there = _channels(channels, BLOCK_C)
    start = dx + image * image_stride + channel * channel_stride
    given = sums + (image * channels + channel) * 9
    for left in range(0, width, BLOCK_W):
        column = left + tl.arange(0, BLOCK_W)[None, :, None]
        at = start + column.to(tl.int64) * column_stride
        mask = there & (column < width)
        before = _across(given, there, column, width)
        centre = _across(given + 3, there, column, width)
        after = _across(given + 6, there, column, width)
        for top in range(0, height, BLOCK_H):
            row = top + tl.arange(0, BLOCK_H)[:, None, None]
            value = tl.where(row < height - 1, before, 0.0) + centre + tl.where(row > 0, after, 0.0)
            tl.store(at + row.to(tl.int64) * row_stride, value, mask=mask & (row < height))


def window_sums(x: Tensor) -> Tensor:
    """(B, C, 9) float32: the sums over the window that each tap sees."""
    sums = x.new_empty(*x.shape[:2], 9, dtype=torch.float32)
    _launch(_window_sums, x, sums, x)
    return sums


def window_sums_adjoint(
    sums: Tensor, height: int, width: int, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """(B, C, height, width) in `dtype`: each pixel the sum over the taps that see it; sums (B, C, 9)."""
    shape = (*sums.shape[:2], height, width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dx = torch.empty(shape, dtype=dtype, device=sums.device, memory_format=layout)
    _launch(_adjoint, sums.contiguous(), dx, dx)
    return dx


def _launch(kernel, source: Tensor, target: Tensor, image: Tensor) -> None:
    """kernel(source, target, shape and strides of image) over all images and bundles of channels."""
    if not image.numel():
        return
    batch, channels, height, width = image.shape
    bytes_a_channel = image.element_size() if image.stride(1) == 1 else 0
    block_h, block_w, block_c = blocks(channels, height, width, bytes_a_channel)
    programs = batch * triton.cdiv(channels, block_c)
    with torch.cuda.device_of(image):
        kernel[(programs,)](
            source,
            target,
            channels,
            height,
            width,
            *image.stride(),
            BLOCK_H=block_h,
            BLOCK_W=block_w,
            BLOCK_C=block_c,
            num_warps=_WARPS,
        )


def blocks(channels: int, height: int, width: int, bytes_a_channel: int) -> tuple[int, int, int]:
    """BLOCK_H, BLOCK_W, BLOCK_C of a tile; bytes_a_channel 0: columns adjoin in memory, else channels do."""
    rows, columns, every = (triton.next_power_of_2(size) for size in (height, width, channels))
    block_c = min(every, 64 // bytes_a_channel) if bytes_a_channel else 1
    block_w = min(columns, _TILE // block_c)
    block_h = min(rows, _TILE // (block_c * block_w))
    return block_h, block_w, max(block_c, min(every, _TILE // (block_h * block_w)))
