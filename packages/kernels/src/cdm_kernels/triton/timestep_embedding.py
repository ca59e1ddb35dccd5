"""Triton kernel of `cdm_kernels.timestep_embedding`, float32.

One program takes a tile of (times, frequencies). `tl.sin` and `tl.cos` are libdevice's: right to 2 units in
the last place for every phase, with a table on the stack for those beyond 1e5.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 512
_WARPS = 4


@triton.jit
def _embedding(
    t,
    frequencies,
    out,
    batch,
    half,
    dim,
    factor,
    SIN_FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    frequency = factor * tl.load(frequencies + column, mask=column < half, other=0.0)
    phase = tl.load(t + row, mask=row < batch, other=0.0) * frequency
    at = out + row.to(tl.int64) * dim + column
    there = (row < batch) & (column < half)
    tl.store(at + (0 if SIN_FIRST else half), tl.sin(phase), mask=there)
    tl.store(at + (half if SIN_FIRST else 0), tl.cos(phase), mask=there)
    # Of an odd dim the last column.
    tl.store(at + 2 * half, tl.zeros_like(phase), mask=(row < batch) & (column < dim - 2 * half))


def sinusoidal_embedding(t: Tensor, frequencies: Tensor, sin_first: bool, dim: int, factor: float) -> Tensor:
    """Sines and cosines of t_b (factor frequencies_i), (B, dim); t (B,), frequencies (half,) float32."""
    batch, half = t.shape[0], frequencies.shape[0]
    out = t.new_empty(batch, dim)
    if not out.numel():
        return out
    block_b, block_f = blocks(half)
    grid = (triton.cdiv(batch, block_b), triton.cdiv(max(half, 1), block_f))
    with torch.cuda.device_of(t):
        _embedding[grid](
            t.contiguous(),
            frequencies.contiguous(),
            out,
            batch,
            half,
            dim,
            float(factor),
            SIN_FIRST=sin_first,
            BLOCK_B=block_b,
            BLOCK_F=block_f,
            num_warps=_WARPS,
        )
    return out


def blocks(half: int) -> tuple[int, int]:
    """BLOCK_B and BLOCK_F for `half` frequencies."""
    block_f = min(triton.next_power_of_2(max(half, 1)), _TILE // 4)
    return _TILE // block_f, block_f
