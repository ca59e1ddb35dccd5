"""Sinusoidal embeddings of a time or noise level, in the four published conventions.

All are sines and cosines of t * omega_i; they differ in the frequencies omega_i and in which half comes
first, and a network trained with one is garbage with another. With s and c the two halves, and p and q their
cotangents, the cotangent of the phase is p c - q s: derivatives of any order, and no sine is computed twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels.dispatch import define, has_kernel, kernels, traced
from cdm_kernels.precision import at_least_float32


def ddpm_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[sin, cos] of t * max_period^(-i / (dim/2 - 1)): fairseq, DDPM (Ho et al. 2020), DDIM.

    t (B,) steps, int or float; dim >= 4. Returns (B, dim) float32 (float64 for float64 t).
    """
    return _geometric(t, dim, dim // 2 - 1, max_period, sin_first=True)


def adm_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos, sin] of t * max_period^(-i / (dim/2)): guided-diffusion (Dhariwal & Nichol 2021), DiT.

    t (B,) steps, int or float; dim >= 2. Returns (B, dim) float32 (float64 for float64 t).
    """
    return _geometric(t, dim, dim // 2, max_period, sin_first=False)


def edm_positional_embedding(
    t: Tensor, dim: int, max_positions: float = 10000.0, endpoint: bool = False
) -> Tensor:
    """[cos, sin] of t * max_positions^(-i / (dim/2 - endpoint)): EDM (Karras et al. 2022).

    t (B,) noise labels; dim even. EDM's DDPM++ asks for `endpoint` and then swaps the halves, which is
    `ddpm_embedding`. Returns (B, dim) float32 (float64 for float64 t).
    """
    return _geometric(t, dim, dim // 2 - endpoint, max_positions, sin_first=False)


def edm_fourier_embedding(t: Tensor, frequencies: Tensor) -> Tensor:
    """[cos, sin] of 2 pi t f_i: random Fourier features (NCSN++, Song et al. 2021; EDM).

    t (B,) noise labels; frequencies (dim/2,), drawn once as 16 * N(0, 1) and stored with the weights.
    Returns (B, dim) float32 (float64 for float64 t).
    """
    return sinusoidal_embedding(t, frequencies, False, 2 * frequencies.shape[0], 2 * math.pi)


def sinusoidal_embedding(
    t: Tensor, frequencies: Tensor, sin_first: bool, dim: int, factor: float = 1.0
) -> Tensor:
    """[sin, cos] of t * (factor * frequencies_i), or [cos, sin]; a zero column at the end where dim is odd.

    t (B,), frequencies (half,), any float dtype; dim 2 half or 2 half + 1. Phases are rounded to float32, and
    their sines and cosines right to 4e-8 (on a GPU 1.2e-7). Returns (B, dim) float32 (float64 for float64 t).
    Derivatives of any order.
    """
    if t.ndim != 1 or frequencies.ndim != 1 or dim // 2 != frequencies.shape[0]:
        shapes = f"t {tuple(t.shape)}, frequencies {tuple(frequencies.shape)}, dim {dim}"
        raise ValueError(f"t must be (B,), frequencies (dim // 2,); {shapes}")
    t = at_least_float32(t)
    frequencies = frequencies.to(t)
    if traced(t, frequencies) and has_kernel(t):
        return _embedding(t, frequencies, sin_first, dim, factor)
    return _eager(t, frequencies, sin_first, dim, factor)


def reference(t: Tensor, frequencies: Tensor, sin_first: bool, dim: int, factor: float = 1.0) -> Tensor:
    """`sinusoidal_embedding` in plain PyTorch."""
    phase = t[:, None] * (factor * frequencies)
    halves = [phase.sin(), phase.cos()] if sin_first else [phase.cos(), phase.sin()]
    return F.pad(torch.cat(halves, 1), (0, dim % 2))


# -- frequencies ---------------------------------------------------------------------------------------------

_tables: dict[tuple[int, int, float, torch.dtype, torch.device], Tensor] = {}


def _geometric(t: Tensor, dim: int, last: int, max_period: float, sin_first: bool) -> Tensor:
    """The embedding with frequencies max_period^(-i / last), i < dim // 2."""
    t = at_least_float32(t)
    if traced(t) or torch._C._are_functorch_transforms_active():
        return sinusoidal_embedding(t, _table(dim // 2, last, max_period, t), sin_first, dim)
    return _eager(t, _frequencies(dim // 2, last, max_period, t), sin_first, dim, 1.0)


def _frequencies(half: int, last: int, max_period: float, t: Tensor) -> Tensor:
    """`_table`, made once and kept."""
    key = (half, last, max_period, t.dtype, t.device)
    found = _tables.get(key)
    if found is None:
        with torch.inference_mode(False):  # a training step may ask for it next
            found = _table(half, last, max_period, t)
        # What is made while a graph is captured belongs to the graph.
        if not (t.is_cuda and torch.cuda.is_current_stream_capturing()):
            _tables[key] = found
    return found


def _table(half: int, last: int, max_period: float, t: Tensor) -> Tensor:
    """max_period^(-i / last), i < half, computed in float64; in dtype and on the device of t."""
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) / last
    return torch.exp(-math.log(max_period) * exponent).to(t.dtype)


# -- derivatives ---------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    t, frequencies, ctx.sin_first, _, ctx.factor = inputs
    ctx.save_for_backward(t, frequencies, output)


def _differentiate(ctx: Any, dy: Tensor) -> Any:
    t, frequencies, y = ctx.saved_tensors
    half = frequencies.shape[0]
    # y is the output itself, so further derivatives come this way again.
    (p, q), (s, c) = dy.split(half, 1)[:2], y.split(half, 1)[:2]
    if not ctx.sin_first:
        p, q, s, c = q, p, c, s
    dphase = torch.addcmul(p * c, q, s, value=-1)
    dt = dfrequencies = None
    if ctx.needs_input_grad[0]:
        dt = (dphase * (frequencies if ctx.factor == 1 else ctx.factor * frequencies)).sum(1)
    if ctx.needs_input_grad[1]:
        dfrequencies = (dphase * (ctx.factor * t)[:, None]).sum(0)
    return dt, dfrequencies, None, None, None


# -- in eager ------------------------------------------------------------------------------------------------


def _eager(t: Tensor, frequencies: Tensor, sin_first: bool, dim: int, factor: float) -> Tensor:
    if not has_kernel(t):
        return reference(t, frequencies, sin_first, dim, factor)
    if torch.is_grad_enabled() and (t.requires_grad or frequencies.requires_grad):
        return _Embedding.apply(t, frequencies, sin_first, dim, factor)
    return kernels(t, "timestep_embedding").sinusoidal_embedding(t, frequencies, sin_first, dim, factor)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = kernels(inputs[0], "timestep_embedding").sinusoidal_embedding(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if ctx.needs_input_grad[1] or not has_kernel(dy, triton=False):
            return _differentiate(ctx, dy)
        _, frequencies, y = ctx.saved_tensors
        arguments = dy, y, frequencies, ctx.sin_first, ctx.factor
        slope = _Slope.apply if torch.is_grad_enabled() else kernels(dy, "timestep_embedding").slope
        return slope(*arguments), None, None, None, None


class _Slope(torch.autograd.Function):
    """The cotangent of t in one pass; y is the output itself, so further derivatives come this way again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        dy, y, frequencies, ctx.sin_first, ctx.factor = inputs
        ctx.save_for_backward(dy, y, frequencies)
        return kernels(dy, "timestep_embedding").slope(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        dy, y, frequencies = ctx.saved_tensors
        # With w = v factor frequencies: of p and q, w c and -w s; of s and c, -w q and w p.
        w = v[:, None] * (frequencies if ctx.factor == 1 else ctx.factor * frequencies)
        return (
            _turned(w, y, ctx.sin_first) if ctx.needs_input_grad[0] else None,
            _turned(-w, dy, ctx.sin_first) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
        )


def _turned(w: Tensor, pair: Tensor, sin_first: bool) -> Tensor:
    """w (B, half) times (c, -s) of a pair (s, c) (B, dim), in the pair's order, zeros after it."""
    first, second = pair[:, : w.shape[1]], pair[:, w.shape[1] : 2 * w.shape[1]]
    turned = [w * second, -w * first] if sin_first else [-w * second, w * first]
    rest = pair.shape[1] - 2 * w.shape[1]
    return F.pad(torch.cat(turned, 1), (0, rest)) if rest else torch.cat(turned, 1)


# -- where a compiler looks on -------------------------------------------------------------------------------


def _fake(t: Tensor, frequencies: Tensor, sin_first: bool, dim: int, factor: float) -> Tensor:
    return t.new_empty(t.shape[0], dim)


_embedding = define(
    "sinusoidal_embedding(Tensor t, Tensor frequencies, bool sin_first, SymInt dim, float factor) -> Tensor",
    "timestep_embedding",
    "sinusoidal_embedding",
    _fake,
    _differentiate,
    _save,
)
