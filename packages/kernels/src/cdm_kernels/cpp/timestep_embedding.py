"""C++ kernel of `cdm_kernels.timestep_embedding`, float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_kernels.cpp import DTYPES, Kernel

_EMBEDDING = Kernel("cdm_sinusoidal_embedding", "iiiiiidppp")
_SLOPE = Kernel("cdm_sinusoidal_embedding_slope", "iiiiiidpppp")


def sinusoidal_embedding(t: Tensor, frequencies: Tensor, sin_first: bool, dim: int, factor: float) -> Tensor:
    """Sines and cosines of t_b (factor frequencies_i), (B, dim); t (B,), frequencies (half,) of one dtype."""
    batch, half = t.shape[0], frequencies.shape[0]
    out = t.new_empty(batch, dim)
    shape = (batch, half, dim, sin_first, DTYPES[t.dtype], torch.get_num_threads())
    _EMBEDDING(*shape, factor, t.contiguous(), frequencies.contiguous(), out)
    return out


def slope(dy: Tensor, y: Tensor, frequencies: Tensor, sin_first: bool, factor: float) -> Tensor:
    """(B,): the derivative in t of sum(dy * y); dy and y, the embedding, (B, dim) of one dtype."""
    batch, dim = y.shape
    out = y.new_empty(batch)
    shape = (batch, frequencies.shape[0], dim, sin_first, DTYPES[y.dtype], torch.get_num_threads())
    _SLOPE(*shape, factor, dy.contiguous(), y.contiguous(), frequencies.contiguous(), out)
    return out
