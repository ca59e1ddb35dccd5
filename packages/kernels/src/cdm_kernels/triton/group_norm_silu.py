"""Triton kernels of `cdm_kernels.group_norm_silu`: x (B, C, *spatial) float32, float16 or bfloat16.

One program takes one image and a bundle of whole groups, and walks over its pixels in tiles of (channels,
pixels); every pass after the first finds the bundle in cache. A group of D channels lies in BLOCK_D rows of
the tile, the least power of two that holds them, so that a sum over a group is a reshape and a sum; what
belongs to a channel is a column. All sums over a group are sums over the pixels of a channel, weighted.
Contiguous images bundle one group, channels last as many as make 64 bytes a pixel. The algebra is in
`cdm_kernels.group_norm_silu`.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdm_kernels.dispatch import dense, like

_TILE = 2048
_A_WARP = 128  # elements of a tile: four a thread keep the double backward in registers


@triton.jit
def _rows(channels, pixels, channel_stride, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's image, and its rows' groups, channels, first pixels' offsets, and which rows exist."""
    groups = channels // D
    bundles = tl.cdiv(groups, GROUPS)
    image = (tl.program_id(0) // bundles).to(tl.int64)
    row = tl.arange(0, GROUPS * BLOCK_D)[:, None]
    index = tl.program_id(0) % bundles * GROUPS + row // BLOCK_D
    channel = index * D + row % BLOCK_D
    start = image * channels * pixels + channel.to(tl.int64) * channel_stride
    return image, image * groups + index, channel, start, (row % BLOCK_D < D) & (index < groups)


@triton.jit
def _tile(start, there, first, pixels, pixel_stride, BLOCK_P: tl.constexpr):
    """Offsets and mask of BLOCK_P pixels from `first` on."""
    pixel = first + tl.arange(0, BLOCK_P)[None, :]
    return start + pixel.to(tl.int64) * pixel_stride, there & (pixel < pixels)


@triton.jit
def _read(values, at, mask):
    return tl.load(values + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _column(values, at, mask):
    """`_read`, zeros for None."""
    if values is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        return _read(values, at, mask)


@triton.jit
def _group_mean(sums, count, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A column's sum over each group, over `count`, put to every row of the group."""
    mean = tl.sum(tl.reshape(sums, (GROUPS, BLOCK_D)), 1, keep_dims=True) / count
    return tl.reshape(tl.broadcast_to(mean, (GROUPS, BLOCK_D)), (GROUPS * BLOCK_D, 1))


@triton.jit
def _slope(h, sig):
    """silu'(h)."""
    return sig * (1.0 + h * (1.0 - sig))


@triton.jit
def _bend(h, sig):
    """silu''(h)."""
    return sig * (1.0 - sig) * (2.0 + h * (1.0 - 2.0 * sig))


@triton.jit
def _forward(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    channels,
    pixels,
    channel_stride,
    pixel_stride,
    weight_stride,
    eps,
    SILU: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    image, index, channel, start, there = _rows(channels, pixels, channel_stride, D, GROUPS, BLOCK_D)
    count = 1.0 * D * pixels
    nothing = tl.zeros((GROUPS * BLOCK_D, BLOCK_P), tl.float32)
    total = nothing
    for first in range(0, pixels, BLOCK_P):
        at, mask = _tile(start, there, first, pixels, pixel_stride, BLOCK_P)
        total += _read(x, at, mask)
    mu = _group_mean(tl.sum(total, 1, keep_dims=True), count, GROUPS, BLOCK_D)
    # The second pass corrects the first mean's rounding.
    total = nothing
    square = nothing
    for first in range(0, pixels, BLOCK_P):
        at, mask = _tile(start, there, first, pixels, pixel_stride, BLOCK_P)
        d = tl.where(mask, _read(x, at, mask) - mu, 0.0)
        total += d
        square += d * d
    rest = _group_mean(tl.sum(total, 1, keep_dims=True), count, GROUPS, BLOCK_D)
    variance = _group_mean(tl.sum(square, 1, keep_dims=True), count, GROUPS, BLOCK_D) - rest * rest
    variance = tl.maximum(variance, 0.0)  # of equal numbers, rounding could make it less
    mu += rest
    r = 1.0 / tl.sqrt(variance + eps)
    # All rows of a group hold and write the same.
    tl.store(mean + index, mu, mask=there)
    tl.store(rstd + index, r, mask=there)
    gain = r * _column(weight, image * weight_stride + channel, there)
    shift = _column(bias, image * weight_stride + channel, there)
    for first in range(0, pixels, BLOCK_P):
        at, mask = _tile(start, there, first, pixels, pixel_stride, BLOCK_P)
        h = (_read(x, at, mask) - mu) * gain + shift
        if SILU:
            h *= tl.sigmoid(h)
        tl.store(y + at, h, mask=mask)


@triton.jit
def _backward(
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    dx,
    dweight,
    dbias,
    channels,
    pixels,
    channel_stride,
    pixel_stride,
    weight_stride,
    SILU: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    image, index, channel, start, there = _rows(channels, pixels, channel_stride, D, GROUPS, BLOCK_D)
    count = 1.0 * D * pixels
    mu, r = _column(mean, index, there), _column(rstd, index, there)
    w = _column(weight, image * weight_stride + channel, there)
    b = _column(bias, image * weight_stride + channel, there)
    q_sum = tl.zeros((GROUPS * BLOCK_D, BLOCK_P), tl.float32)
    qx_sum = q_sum
    for first in range(0, pixels, BLOCK_P):
        at, mask = _tile(start, there, first, pixels, pixel_stride, BLOCK_P)
        normal = (_read(x, at, mask) - mu) * r
        q = _read(dy, at, mask)
        if SILU:
            h = normal * w + b
            q *= _slope(h, tl.sigmoid(h))
        q_sum += q
        qx_sum += q * normal
    q_row, qx_row = tl.sum(q_sum, 1, keep_dims=True), tl.sum(qx_sum, 1, keep_dims=True)
    tl.store(dweight + image * channels + channel, qx_row, mask=there)
    tl.store(dbias + image * channels + channel, q_row, mask=there)
    a_mean = _group_mean(w * q_row, count, GROUPS, BLOCK_D)
    ax_mean = _group_mean(w * qx_row, count, GROUPS, BLOCK_D)
    for first in range(0, pixels, BLOCK_P):
        at, mask = _tile(start, there, first, pixels, pixel_stride, BLOCK_P)
        normal = (_read(x, at, mask) - mu) * r
        q = _read(dy, at, mask)
        if SILU:
            h = normal * w + b
            q *= _slope(h, tl.sigmoid(h))
        tl.store(dx + at, r * (w * q - a_mean - normal * ax_mean), mask=mask)


@triton.jit
def _double_backward(
    v,
    alpha,
    beta,
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    ddy,
    dx,
    dweight,
    dbias,
    channels,
    pixels,
    channel_stride,
    pixel_stride,
    weight_stride,
    SILU: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    image, index, channel, start, there = _rows(channels, pixels, channel_stride, D, GROUPS, BLOCK_D)
    count = 1.0 * D * pixels
    mu, r = _column(mean, index, there), _column(rstd, index, there)
    w = _column(weight, image * weight_stride + channel, there)
    b = _column(bias, image * weight_stride + channel, there)
    on_normal = _column(alpha, image * weight_stride + channel, there)
    constant = _column(beta, image * weight_stride + channel, there)
    # mean v and V = mean(v x^): u = P(v) then needs no other sum.
    nothing = tl.zeros((GROUPS * BLOCK_D, BLOCK_P), tl.float32)
    v_sum = nothing
    vx_sum = nothing
    for first in range(0, pixels, BLOCK_P):
        at, mask = _tile(start, there, first, pixels, pixel_stride, BLOCK_P)
        value = _read(v, at, mask)
        v_sum += value
        vx_sum += value * ((_read(x, at, mask) - mu) * r)
    v_mean = _group_mean(tl.sum(v_sum, 1, keep_dims=True), count, GROUPS, BLOCK_D)
    vx_mean = _group_mean(tl.sum(vx_sum, 1, keep_dims=True), count, GROUPS, BLOCK_D)
    q_sum = nothing
    qx_sum = nothing
    qu_sum = nothing
    e_sum = nothing
    ex_sum = nothing
    for first in range(0, pixels, BLOCK_P):
        at, mask = _tile(start, there, first, pixels, pixel_stride, BLOCK_P)
        normal = (_read(x, at, mask) - mu) * r
        q = _read(dy, at, mask)
        u = r * (_read(v, at, mask) - v_mean - normal * vx_mean)
        inner = w * u + on_normal * normal + constant
        if SILU:
            h = normal * w + b
            sig = tl.sigmoid(h)
            e = q * inner * _bend(h, sig)
            e_sum += e
            ex_sum += e * normal
            inner *= _slope(h, sig)
            q *= _slope(h, sig)
        tl.store(ddy + at, inner, mask=mask)
        q_sum += q
        qx_sum += q * normal
        qu_sum += q * u
    q_row, qx_row = tl.sum(q_sum, 1, keep_dims=True), tl.sum(qx_sum, 1, keep_dims=True)
    e_row, ex_row = tl.sum(e_sum, 1, keep_dims=True), tl.sum(ex_sum, 1, keep_dims=True)
    qu_row = tl.sum(qu_sum, 1, keep_dims=True)
    tl.store(dweight + image * channels + channel, qu_row + ex_row, mask=there)
    tl.store(dbias + image * channels + channel, e_row, mask=there)
    z_mean = _group_mean(w * e_row + on_normal * q_row, count, GROUPS, BLOCK_D)  # z = w e + alpha q
    zx_mean = _group_mean(w * ex_row + on_normal * qx_row, count, GROUPS, BLOCK_D)
    a_mean = _group_mean(w * q_row, count, GROUPS, BLOCK_D)
    ax_mean = _group_mean(w * qx_row, count, GROUPS, BLOCK_D)
    au_mean = _group_mean(w * qu_row, count, GROUPS, BLOCK_D)  # r (C - V A)
    # dx = P(z) - r^2 (A (v - mean v) + V (a - mean a) + x^ (C - 3 V A)), in the order of its terms
    on_x = 2.0 * r * ax_mean * vx_mean - au_mean - zx_mean
    rest = r * (ax_mean * v_mean + vx_mean * a_mean) - z_mean
    for first in range(0, pixels, BLOCK_P):
        at, mask = _tile(start, there, first, pixels, pixel_stride, BLOCK_P)
        normal = (_read(x, at, mask) - mu) * r
        q = _read(dy, at, mask)
        value = _read(v, at, mask)
        result = rest + on_x * normal - r * ax_mean * value
        if SILU:
            inner = w * (r * (value - v_mean - normal * vx_mean)) + on_normal * normal + constant
            h = normal * w + b
            sig = tl.sigmoid(h)
            result += w * (q * inner * _bend(h, sig))
            q *= _slope(h, sig)
        tl.store(dx + at, r * (result + (on_normal - r * vx_mean * w) * q), mask=mask)


def _launch(
    kernel: Any, tensors: tuple[Any, ...], x: Tensor, weight: Tensor, groups: int, *rest: Any
) -> None:
    """kernel(*tensors, shape of x, *rest) over all images and bundles; x in one of the layouts of `dense`."""
    batch, channels = x.shape[:2]
    if not x.numel():
        return
    pixels, group = x.numel() // (batch * channels), channels // groups
    contiguous = x.is_contiguous()
    bundle, block_d, block_p, warps = blocks(group, groups, pixels, 0 if contiguous else x.element_size())
    strides = (pixels, 1) if contiguous else (1, channels)
    weight_stride = channels if weight.ndim == 2 else 0
    programs = batch * triton.cdiv(groups, bundle)
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            *tensors,
            channels,
            pixels,
            *strides,
            weight_stride,
            *rest,
            D=group,
            GROUPS=bundle,
            BLOCK_D=block_d,
            BLOCK_P=block_p,
            num_warps=warps,
        )


def blocks(group: int, groups: int, pixels: int, bytes_a_channel: int) -> tuple[int, int, int, int]:
    """GROUPS, BLOCK_D, BLOCK_P and warps for groups of `group` channels; bytes_a_channel 0: pixels adjoin."""
    bundle, block_d = 1, triton.next_power_of_2(group)
    while bundle < groups and 0 < bundle * group * bytes_a_channel < 64:
        bundle *= 2
    rows = bundle * block_d
    block_p = max(min(triton.next_power_of_2(pixels), _TILE // rows), 1)
    return bundle, block_d, block_p, max(min(rows * block_p, _TILE) // _A_WARP, 1)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and mean and 1 / std of each group, (B, groups) float32."""
    x, _ = dense(x)
    y = torch.empty_like(x)
    mean, rstd = weight.new_empty(x.shape[0], groups), weight.new_empty(x.shape[0], groups)
    tensors = (x, weight.contiguous(), bias.contiguous(), y, mean, rstd)
    _launch(_forward, tensors, x, weight, groups, eps, activation)
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
    dx, dweight, dbias = torch.empty_like(x), *(weight.new_empty(x.shape[:2]) for _ in range(2))
    small = (mean, rstd, weight.contiguous(), bias.contiguous())
    tensors = (like(dy, channels_last), x, *small, dx, dweight, dbias)
    _launch(_backward, tensors, x, weight, groups, activation)
    return dx, *_of_weight(weight, dweight, dbias)


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
    ddy, dx = torch.empty_like(x), torch.empty_like(x)
    dweight, dbias = (weight.new_empty(x.shape[:2]) for _ in range(2))
    given = (like(v, channels_last), *(None if part is None else part.contiguous() for part in (alpha, beta)))
    saved = (like(dy, channels_last), x, mean, rstd, weight.contiguous(), bias.contiguous())
    _launch(_double_backward, (*given, *saved, ddy, dx, dweight, dbias), x, weight, groups, activation)
    return ddy, dx, *_of_weight(weight, dweight, dbias)


def _of_weight(weight: Tensor, dweight: Tensor, dbias: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pixels (B, C), summed over images where weight is (C,)."""
    return (dweight, dbias) if weight.ndim == 2 else (dweight.sum(0), dbias.sum(0))
