"""Sinusoidal embeddings beside their official code: DDPM's, and EDM's of Fourier features."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cdm_kernels import ddpm_embedding, edm_fourier_embedding


def official_ddpm(t: Tensor, dim: int) -> Tensor:
    half = dim // 2
    step = math.log(10000) / (half - 1)
    phase = t[:, None] * torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * -step)[None, :]
    return torch.cat([torch.sin(phase), torch.cos(phase)], dim=1)


def official_fourier(t: Tensor, frequencies: Tensor) -> Tensor:
    phase = t.ger((2 * math.pi * frequencies).to(t.dtype))
    return torch.cat([phase.cos(), phase.sin()], dim=1)


CONVENTIONS = {"ddpm": (ddpm_embedding, official_ddpm), "fourier": (edm_fourier_embedding, official_fourier)}


def differentiate(function: Callable[..., Tensor], *inputs: Any, order: str) -> Tensor:
    """forward: the values; backward: their gradient in t; full: that of this gradient."""
    t, argument, dy, v = inputs
    if order == "forward":
        with torch.no_grad():
            return function(t, argument)
    y = function(t, argument)
    (dt,) = torch.autograd.grad(y, t, dy, create_graph=order == "full")
    return torch.autograd.grad(dt, t, v)[0] if order == "full" else dt


@pytest.mark.parametrize("order", ["forward", "backward", "full"])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("batch", [1, 64, 4096])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_timestep_embedding(side_by_side: Any, name: str, batch: int, dim: int, order: str) -> None:
    function, official = CONVENTIONS[name]
    t = torch.rand(batch, requires_grad=True)  # and phases small enough that their last bits do not matter
    argument = dim if name == "ddpm" else torch.randn(dim // 2)
    inputs = (t, argument, torch.randn(batch, dim), torch.randn(batch))
    side_by_side(
        lambda: differentiate(function, *inputs, order=order),
        lambda: differentiate(official, *inputs, order=order),
    )
    found, expected = (differentiate(each, *inputs, order=order) for each in (function, official))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
