"""C++ kernels of `cdm_kernels.head`: o (B, K) float32, bfloat16 or float64; t (B,) int64."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cdm_kernels.cpp import DTYPES, Kernel

_ROWS = "i" * 5
_FORWARD = Kernel("cdm_head", _ROWS + "p" * 7)
_BACKWARD = Kernel("cdm_head_backward", _ROWS + "p" * 6)
_DOUBLE_BACKWARD = Kernel("cdm_head_double_backward", _ROWS + "p" * 8)


def _rows(o: Tensor, reference: int) -> tuple[int, ...]:
    return (*o.shape, DTYPES[o.dtype], torch.get_num_threads(), reference)


def new_summary(o: Tensor) -> Tensor:
    """Room for the summary of `forward`."""
    return o.new_empty(len(o), 3, dtype=_accumulator(o))


def _accumulator(o: Tensor) -> torch.dtype:
    return torch.float64 if o.dtype == torch.float64 else torch.float32


def forward(o: Tensor, t: Tensor, reference: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy and log-ratio, (B,) float32 (float64 of float64); estimate, (B,) int64; summary for the
    others.

    summary (B, 3): log sum exp(F - max F), and the first and the end of the blocks where p is not 0.
    """
    o, dtype, outside = o.contiguous(), _accumulator(o), ctypes.c_int64()
    batch = len(o)
    cross_entropy, log_ratio = o.new_empty(batch, dtype=dtype), o.new_empty(batch, dtype=dtype)
    outputs = (cross_entropy, log_ratio, t.new_empty(batch), new_summary(o))
    _FORWARD(*_rows(o, reference), o, t.contiguous(), *outputs, ctypes.byref(outside))
    if outside.value:
        raise IndexError(f"a level of t is not one of the {o.shape[1]}")
    return outputs


def cross_entropy(o: Tensor, t: Tensor, summary: Tensor | None = None) -> Tensor:
    """The cross-entropy of `forward` alone, (B,), and its summary where there is room for one, (B, 3)."""
    o, outside = o.contiguous(), ctypes.c_int64()
    out = o.new_empty(len(o), dtype=_accumulator(o))
    _FORWARD(*_rows(o, 0), o, t.contiguous(), out, None, None, summary, ctypes.byref(outside))
    if outside.value:
        raise IndexError(f"a level of t is not one of the {o.shape[1]}")
    return out


def backward(
    g: Tensor | None, h: Tensor | None, o: Tensor, t: Tensor, summary: Tensor, reference: int
) -> Tensor:
    """do, (B, K) in o's dtype; g, h: cotangents of cross-entropy and log-ratio, None where they are zero."""
    o = o.contiguous()
    out = torch.empty_like(o)
    small = (None if part is None else part.contiguous() for part in (g, h))
    _BACKWARD(*_rows(o, reference), *small, o, t.contiguous(), summary, out)
    return out


def double_backward(
    v: Tensor, g: Tensor | None, o: Tensor, t: Tensor, summary: Tensor, reference: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dg and dh, (B,) like summary, and do like o; v: cotangent of `backward`'s result, in o's dtype."""
    o = o.contiguous()
    outputs = (summary.new_empty(len(o)), summary.new_empty(len(o)), torch.empty_like(o))
    g = None if g is None else g.contiguous()
    _DOUBLE_BACKWARD(*_rows(o, reference), v.contiguous(), g, o, t.contiguous(), summary, *outputs)
    return outputs
