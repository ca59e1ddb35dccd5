"""C++ kernels of `cdm_kernels.softmax_gradient`: logits f (B, K) float32, bfloat16 or float64.

target: (B,) int64 classes, or (B, K) soft labels in float32 (float64 beside float64 logits).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from cdm_kernels.cpp import DTYPES, Kernel

_ROWS = "iiiidd"
_FORWARD = Kernel("cdm_softmax_gradient", _ROWS + "p" * 7)
_BACKWARD = Kernel("cdm_softmax_gradient_backward", _ROWS + "p" * 7)
_DOUBLE_BACKWARD = Kernel("cdm_softmax_gradient_double_backward", _ROWS + "p" * 10)


def _rows(f: Tensor, tau1: float, tau2: float) -> tuple[Any, ...]:
    return (*f.shape, DTYPES[f.dtype], torch.get_num_threads(), tau1, tau2)


def _hard_or_soft(target: Tensor) -> tuple[Tensor | None, Tensor | None]:
    target = target.contiguous()
    return (target, None) if target.ndim == 1 else (None, target)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(f: Tensor, target: Tensor, tau1: float, tau2: float) -> tuple[Tensor, Tensor, Tensor]:
    """Value (B,), cotangent (B, K), and for the others the logit of the largest p and the spread, (B, 2).

    All float32, of float64 logits float64.
    """
    f, outside = f.contiguous(), ctypes.c_int64()
    dtype = torch.float64 if f.dtype == torch.float64 else torch.float32
    outputs = tuple(f.new_empty(len(f), *shape, dtype=dtype) for shape in ((), (f.shape[1],), (2,)))
    _FORWARD(*_rows(f, tau1, tau2), f, *_hard_or_soft(target), *outputs, ctypes.byref(outside))
    if outside.value:
        raise IndexError(f"a class of the target is not one of the {f.shape[1]}")
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
    f = f.contiguous()
    out = torch.empty_like(f)
    parts = (_contiguous(a), _contiguous(b), f, *_hard_or_soft(target), statistics)
    _BACKWARD(*_rows(f, tau1, tau2), *parts, out)
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
    """da (B,), db (B, K) like statistics, df like f; u: cotangent of `backward`'s result, in f's dtype."""
    f = f.contiguous()
    outputs = (statistics.new_empty(len(f)), statistics.new_empty(f.shape), torch.empty_like(f))
    parts = (u.contiguous(), _contiguous(a), _contiguous(b), f, *_hard_or_soft(target), statistics)
    _DOUBLE_BACKWARD(*_rows(f, tau1, tau2), *parts, *outputs)
    return outputs
