"""Group normalisation, an optional scale and shift per image and channel, and SiLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cdm_kernels.precision import at_least_float32


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """silu(h (1 + scale) + shift) with h = weight (x - mu) / sqrt(var + eps) + bias, mu and var over a group.

    x (B, C, *spatial), any float dtype; weight, bias (C,); scale, shift (B, C) or None: adaptive
    normalisation; activation False: no SiLU. Computed in float32 (float64 stays), returned in x's dtype.
    """
    h = at_least_float32(x)
    h = F.group_norm(h, groups, weight.to(h.dtype), bias.to(h.dtype), eps)
    per_channel = (*x.shape[:2], *(1,) * (x.ndim - 2))
    if scale is not None:
        h = h * (1 + scale.view(per_channel))
    if shift is not None:
        h = h + shift.view(per_channel)
    return (F.silu(h) if activation else h).to(x.dtype)
