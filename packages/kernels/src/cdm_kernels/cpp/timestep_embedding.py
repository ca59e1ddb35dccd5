"""C++ kernel of `cdm_kernels.timestep_embedding`, float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_kernels.cpp import DTYPES, Kernel

_EMBEDDING = Kernel("cdm_sinusoidal_embedding", "iiiiiidppp")


def sinusoidal_embedding(t: Tensor, frequencies: Tensor, sin_first: bool, dim: int, factor: float) -> Tensor:
    """Sines and cosines of t_b (factor frequencies_i), (B, dim); t (B,), frequencies (half,) of one dtype."""
    batch, half = t.shape[0], frequencies.shape[0]
    out = t.new_empty(batch, dim)
    shape = (batch, half, dim, sin_first, DTYPES[t.dtype], torch.get_num_threads())
    _EMBEDDING(*shape, factor, t.contiguous(), frequencies.contiguous(), out)
    return out
