"""Triton kernels of `cdm_kernels.head`: o (B, K) float32, float16 or bfloat16; t (B,) int64.

One program a row, the row in registers. Running sums are in float64 and relative to the largest before they
are rounded to float32: F reaches 1e4, and p is as good as F - max F. Both sides of t are summed from their
ends.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _terms(x, row, stride, levels, BLOCK: tl.constexpr):
    """x_k of this row in float64, without x_0, and whether k is a level."""
    k = tl.arange(0, BLOCK)
    return tl.load(x + row * stride + k, mask=(k > 0) & (k < levels), other=0.0).to(tl.float64)


@triton.jit
def _at(sums, k, index):
    """sums[index]."""
    return tl.sum(tl.where(k == index, sums, 0.0))


@triton.jit
def _forward(
    o, t, cross_entropy, log_ratio, estimate, summary, stride, levels, reference, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    level = tl.load(t + row)
    sums = tl.cumsum(_terms(o, row, stride, levels, BLOCK), 0)
    peak = tl.max(tl.where(k < levels, sums, -float("inf")), 0)
    e = tl.where(k < levels, tl.exp((sums - peak).to(tl.float32)), 0.0)
    spread = tl.log(tl.sum(e))
    # A level that is none must not pass for one.
    known = (level >= 0) & (level < levels)
    at_level = tl.where(known, _at(sums, k, level), float("nan"))
    tl.store(cross_entropy + row, (peak - at_level).to(tl.float32) + spread)
    tl.store(log_ratio + row, (_at(sums, k, reference) - at_level).to(tl.float32))
    first = tl.min(tl.where((k < levels) & (sums == peak), k, BLOCK), 0)
    tl.store(estimate + row, tl.minimum(first, levels - 1).to(tl.int64))
    tl.store(summary + 3 * row, spread)
    tl.store(summary + 3 * row + 1, 0.0)
    tl.store(summary + 3 * row + 2, 1.0 * levels)


@triton.jit
def _backward(g, h, o, t, summary, out, stride, levels, reference, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    level = tl.load(t + row)
    result = tl.zeros((BLOCK,), tl.float32)
    if g is not None:
        x = _terms(o, row, stride, levels, BLOCK)
        sums = tl.cumsum(x, 0)
        peak = tl.max(tl.where(k < levels, sums, -float("inf")), 0)
        spread = tl.load(summary + 3 * row)
        p = tl.where(k < levels, tl.exp((sums - peak).to(tl.float32) - spread), 0.0)
        p_before = tl.where(k > 0, tl.exp((sums - x - peak).to(tl.float32) - spread), 0.0)  # of k - 1
        left = tl.cumsum(tl.where(k <= level, p_before, 0.0), 0)
        right = tl.cumsum(tl.where(k > level, p, 0.0), 0, reverse=True)
        result += tl.load(g + row) * tl.where(k <= level, 0.0 - left, right)
    if h is not None:
        result += tl.load(h + row) * ((k <= reference).to(tl.float32) - (k <= level).to(tl.float32))
    tl.store(out + row * levels + k, result, mask=k < levels)


@triton.jit
def _double_backward(v, g, o, t, summary, dg, dh, out, stride, levels, reference, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    level = tl.load(t + row)
    sums = tl.cumsum(_terms(o, row, stride, levels, BLOCK), 0)
    peak = tl.max(tl.where(k < levels, sums, -float("inf")), 0)
    first = tl.min(tl.where((k < levels) & (sums == peak), k, BLOCK), 0)
    spread = tl.load(summary + 3 * row)
    p = tl.where(k < levels, tl.exp((sums - peak).to(tl.float32) - spread), 0.0)
    along = tl.cumsum(_terms(v, row, levels, levels, BLOCK), 0)
    centre, at_level = _at(along, k, first), _at(along, k, level)
    d = (along - centre).to(tl.float32)
    mean = tl.sum(p * d)
    tl.store(dg + row, (centre - at_level).to(tl.float32) + mean)
    tl.store(dh + row, (_at(along, k, reference) - at_level).to(tl.float32))
    result = tl.zeros((BLOCK,), tl.float32)
    if g is not None:
        weight = tl.load(g + row) * p * (d - mean)
        left = tl.cumsum(tl.where(k <= level, weight, 0.0), 0) - weight
        right = tl.cumsum(tl.where(k > level, weight, 0.0), 0, reverse=True)
        result += tl.where(k <= level, 0.0 - left, right)
    tl.store(out + row * levels + k, result, mask=k < levels)


def blocks(levels: int) -> tuple[int, int]:
    """BLOCK and warps for rows of so many levels."""
    block = triton.next_power_of_2(levels)
    return block, max(min(block // 128, 16), 1)


def _launch(kernel: Any, tensors: tuple[Any, ...], o: Tensor, reference: int) -> None:
    """kernel(*tensors, shape of o, reference) over all rows."""
    batch, levels = o.shape
    if batch:
        block, warps = blocks(levels)
        with torch.cuda.device_of(o):
            kernel[(batch,)](*tensors, o.stride(0), levels, reference, BLOCK=block, num_warps=warps)


def _dense(o: Tensor) -> Tensor:
    """o, or a copy of it, with the levels of a row side by side: the rows may lie apart."""
    return o if o.stride(1) == 1 else o.contiguous()


def forward(o: Tensor, t: Tensor, reference: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy and log-ratio, (B,) float32; estimate, (B,) int64; summary for the others.

    summary (B, 3) float32: log sum exp(F - max F), and where p may be other than 0: from 0 to K. A level of t
    that is none has NaN for cross-entropy and log-ratio: to raise an error would take a wait for the device.
    """
    o = _dense(o)
    new = lambda *shape: o.new_empty(len(o), *shape, dtype=torch.float32)  # noqa: E731
    outputs = (new(), new(), t.new_empty(len(o)), new(3))
    _launch(_forward, (o, t.contiguous(), *outputs), o, reference)
    return outputs


def backward(
    g: Tensor | None, h: Tensor | None, o: Tensor, t: Tensor, summary: Tensor, reference: int
) -> Tensor:
    """do, (B, K) in o's dtype; g, h: cotangents of cross-entropy and log-ratio, None where they are zero."""
    o, out = _dense(o), o.new_empty(o.shape)
    small = (None if part is None else part.contiguous() for part in (g, h))
    _launch(_backward, (*small, o, t.contiguous(), summary, out), o, reference)
    return out


def double_backward(
    v: Tensor, g: Tensor | None, o: Tensor, t: Tensor, summary: Tensor, reference: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dg and dh, (B,) float32, and do like o; v: cotangent of `backward`'s result, in o's dtype."""
    o = _dense(o)
    outputs = (summary.new_empty(len(o)), summary.new_empty(len(o)), o.new_empty(o.shape))
    g = None if g is None else g.contiguous()
    _launch(_double_backward, (v.contiguous(), g, o, t.contiguous(), summary, *outputs), o, reference)
    return outputs
