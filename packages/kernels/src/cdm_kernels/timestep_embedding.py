"""Sinusoidal embeddings of a time or noise level, in the four published conventions.

All are sines and cosines of t * omega_i; they differ in the frequencies omega_i and in which half comes
first, and a network trained with one is garbage with another.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels.precision import at_least_float32


def _geometric(t: Tensor, half: int, last: int, max_period: float) -> Tensor:
    """Phases t * max_period^(-i / last), i = 0..half-1; (B,) -> (B, half)."""
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) / last
    frequencies = torch.exp(-math.log(max_period) * exponent)
    t = at_least_float32(t)
    return t[:, None] * frequencies.to(t.dtype)


def _joined(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Both halves side by side, a zero column at the end where dim is odd."""
    return F.pad(torch.cat([first, second], 1), (0, dim % 2))


def ddpm_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[sin, cos] of t * max_period^(-i / (dim/2 - 1)): fairseq, DDPM (Ho et al. 2020), DDIM.

    t (B,) steps, int or float; dim >= 4. Returns (B, dim) float32 (float64 for float64 t).
    """
    phase = _geometric(t, dim // 2, dim // 2 - 1, max_period)
    return _joined(phase.sin(), phase.cos(), dim)


def adm_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos, sin] of t * max_period^(-i / (dim/2)): guided-diffusion (Dhariwal & Nichol 2021), DiT.

    t (B,) steps, int or float; dim >= 2. Returns (B, dim) float32 (float64 for float64 t).
    """
    phase = _geometric(t, dim // 2, dim // 2, max_period)
    return _joined(phase.cos(), phase.sin(), dim)


def edm_positional_embedding(
    t: Tensor, dim: int, max_positions: float = 10000.0, endpoint: bool = False
) -> Tensor:
    """[cos, sin] of t * max_positions^(-i / (dim/2 - endpoint)): EDM (Karras et al. 2022).

    t (B,) noise labels; dim even. EDM's DDPM++ asks for `endpoint` and then swaps the halves, which is
    `ddpm_embedding`. Returns (B, dim) float32 (float64 for float64 t).
    """
    phase = _geometric(t, dim // 2, dim // 2 - endpoint, max_positions)
    return torch.cat([phase.cos(), phase.sin()], 1)


def edm_fourier_embedding(t: Tensor, frequencies: Tensor) -> Tensor:
    """[cos, sin] of 2 pi t f_i: random Fourier features (NCSN++, Song et al. 2021; EDM).

    t (B,) noise labels; frequencies (dim/2,), drawn once as 16 * N(0, 1) and stored with the weights.
    Returns (B, dim) float32 (float64 for float64 t).
    """
    t = at_least_float32(t)
    phase = t[:, None] * (2 * math.pi * frequencies.to(t.dtype))
    return torch.cat([phase.cos(), phase.sin()], 1)
