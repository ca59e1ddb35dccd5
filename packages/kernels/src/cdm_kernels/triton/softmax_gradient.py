"""Triton kernels of `cdm_kernels.softmax_gradient`: logits f (B, K) float32, float16 or bfloat16.

One program a row, the row in registers. Differences to the logit of the largest p are taken before they are
scaled: of logits of 1e4 products would lose what matters; and what is centred is so from its entry there, so
that nothing cancels where p is almost one. target as `cdm_kernels.cpp.softmax_gradient` has it.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row(values, stride, classes, BLOCK: tl.constexpr):
    """This program's row in float32, zeros past its end."""
    k = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * stride
    return tl.load(values + start + k, mask=k < classes, other=0.0).to(tl.float32)


@triton.jit
def _labels(target, classes, SOFT: tl.constexpr, BLOCK: tl.constexpr):
    if SOFT:
        return _row(target, classes, classes, BLOCK)
    else:
        index = tl.load(target + tl.program_id(0))
        # A class that is none must not pass for one.
        one = tl.where((index >= 0) & (index < classes), 1.0, float("nan"))
        return tl.where(tl.arange(0, BLOCK) == index, 1.0, 0.0) * one


@triton.jit
def _probabilities(f, statistics, classes, tau2, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    top, spread = tl.load(statistics + 2 * row), tl.load(statistics + 2 * row + 1)
    return tl.where(tl.arange(0, BLOCK) < classes, tl.exp(tau2 * (f - top) - spread), 0.0)


@triton.jit
def _centred(x, p, f, statistics, BLOCK: tl.constexpr):
    """x - sum p x, and sum p x."""
    k = tl.arange(0, BLOCK)
    top = tl.min(tl.where(f == tl.load(statistics + 2 * tl.program_id(0)), k, BLOCK - 1), 0)
    x_top = tl.sum(tl.where(k == top, x, 0.0))
    mean = tl.sum(p * (x - x_top))
    return x - x_top - mean, x_top + mean


@triton.jit
def _forward(
    f,
    target,
    value,
    cotangent,
    statistics,
    stride,
    classes,
    tau1,
    tau2,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    there = k < classes
    x = _row(f, stride, classes, BLOCK)
    q = _labels(target, classes, SOFT, BLOCK)
    sign = tl.where(tau2 < 0, -1.0, 1.0)
    top = sign * tl.max(tl.where(there, sign * x, -float("inf")), 0)
    e = tl.where(there, tl.exp(tau2 * (x - top)), 0.0)
    total = tl.sum(e)
    # In float64, as <q, f> may cancel with f*; and a class that is ruled out, f = -inf, may have no label.
    energy = tau1 * tl.sum(tl.where(q == 0, 0.0, q.to(tl.float64) * x)) - tau2 * top.to(tl.float64)
    tl.store(value + row, energy.to(tl.float32) - tl.log(total))
    tl.store(cotangent + row * classes + k, tau1 * q - tau2 / total * e, mask=there)
    tl.store(statistics + 2 * row, top)
    tl.store(statistics + 2 * row + 1, tl.log(total))


@triton.jit
def _backward(
    a, b, f, target, statistics, out, stride, classes, tau1, tau2, SOFT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = _row(f, stride, classes, BLOCK)
    p = _probabilities(x, statistics, classes, tau2, BLOCK)
    result = tl.zeros((BLOCK,), tl.float32)
    if a is not None:
        q = _labels(target, classes, SOFT, BLOCK)
        result += tl.load(a + row) * (tau1 * q - tau2 * p)
    if b is not None:
        other, _ = _centred(_row(b, classes, classes, BLOCK), p, x, statistics, BLOCK)
        result -= tau2 * tau2 * p * other
    tl.store(out + row * classes + k, result, mask=k < classes)


@triton.jit
def _double_backward(
    u,
    a,
    b,
    f,
    target,
    statistics,
    da,
    db,
    df,
    stride,
    classes,
    tau1,
    tau2,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    there = k < classes
    x = _row(f, stride, classes, BLOCK)
    p = _probabilities(x, statistics, classes, tau2, BLOCK)
    direction = _row(u, classes, classes, BLOCK)
    q = _labels(target, classes, SOFT, BLOCK)
    centred, mean = _centred(direction, p, x, statistics, BLOCK)
    tl.store(da + row, tau1 * tl.sum(q * direction) - tau2 * mean)
    second = -tau2 * tau2 * p * centred
    tl.store(db + row * classes + k, second, mask=there)
    result = tl.zeros((BLOCK,), tl.float32)
    if a is not None:
        result += tl.load(a + row) * second
    if b is not None:
        other, _ = _centred(_row(b, classes, classes, BLOCK), p, x, statistics, BLOCK)
        product = other * centred
        result -= tau2 * tau2 * tau2 * p * (product - tl.sum(p * product))
    tl.store(df + row * classes + k, result, mask=there)


def blocks(classes: int) -> tuple[int, int]:
    """BLOCK and warps for rows of so many classes."""
    block = triton.next_power_of_2(classes)
    return block, max(min(block // 128, 16), 1)


def _launch(
    kernel: Any, tensors: tuple[Any, ...], f: Tensor, target: Tensor, tau1: float, tau2: float
) -> None:
    """kernel(*tensors, shape of f, temperatures) over all rows."""
    batch, classes = f.shape
    if batch:
        block, warps = blocks(classes)
        with torch.cuda.device_of(f):
            kernel[(batch,)](
                *tensors,
                f.stride(0),
                classes,
                tau1,
                tau2,
                SOFT=target.ndim == 2,
                BLOCK=block,
                num_warps=warps,
            )


def _dense(f: Tensor) -> Tensor:
    """f, or a copy of it, with the classes of a row side by side: the rows may lie apart."""
    return f if f.stride(1) == 1 else f.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(f: Tensor, target: Tensor, tau1: float, tau2: float) -> tuple[Tensor, Tensor, Tensor]:
    """Value (B,), cotangent (B, K), and for the others the logit of the largest p and the spread, (B, 2).

    All float32. A class that is none has NaN for its value and cotangent: to raise an error would take a wait
    for the device.
    """
    f = _dense(f)
    outputs = tuple(f.new_empty(len(f), *shape, dtype=torch.float32) for shape in ((), (f.shape[1],), (2,)))
    _launch(_forward, (f, target.contiguous(), *outputs), f, target, tau1, tau2)
    return outputs  # type: ignore[return-value]


def backward(
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    target: Tensor,
    statistics: Tensor,
    tau1: float,
    tau2: float,
) -> Tensor:
    """df like f; a (B,), b (B, K): cotangents of value and cotangent, None where they are zero."""
    f, out = _dense(f), f.new_empty(f.shape)
    parts = (_contiguous(a), _contiguous(b), f, target.contiguous(), statistics)
    _launch(_backward, (*parts, out), f, target, tau1, tau2)
    return out


def double_backward(
    u: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    target: Tensor,
    statistics: Tensor,
    tau1: float,
    tau2: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """da (B,), db (B, K) float32, df like f; u: cotangent of `backward`'s result, in f's dtype."""
    f = _dense(f)
    outputs = (statistics.new_empty(len(f)), statistics.new_empty(f.shape), f.new_empty(f.shape))
    parts = (u.contiguous(), _contiguous(a), _contiguous(b), f, target.contiguous(), statistics)
    _launch(_double_backward, (*parts, *outputs), f, target, tau1, tau2)
    return outputs
