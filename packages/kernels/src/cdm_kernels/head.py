"""Head of a noise-level classifier: cumulative logits, their cross-entropy, and the log-ratio of two levels.

A classifier of K noise levels puts out o (B, K), the log-ratios of adjacent levels; its logits are the
running sums F_t = sum_{j <= t} o_j (Yadin, Elata, Michaeli 2024, "Classification Diffusion Models"). o_0 is
common to all logits: it cancels in every probability and every ratio, so the loss and the ratios drop it and
its gradient is exactly zero. Logits reach 1e4 nats: everything here is float32 or better.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels.precision import at_least_float32


def cumulative_logits(o: Tensor) -> Tensor:
    """F_t = sum_{j <= t} o_j; (B, K) of any float dtype -> (B, K) float32 (float64 stays)."""
    return at_least_float32(o).cumsum(-1)


def noise_level_cross_entropy(o: Tensor, t: Tensor) -> Tensor:
    """-log p(t | x) = logsumexp(F) - F_t, nats.

    With p = softmax(F) and S_j = sum_{k >= j} p_k the gradient is S_j - [j <= t]: every row of the head
    learns from every image. o_0 is dropped, so its gradient is 0 exactly and not up to rounding.

    o (B, K) adjacent log-ratios, any float dtype; t (B,) int64 level indices. Returns (B,) float32.
    """
    relative = F.pad(at_least_float32(o)[:, 1:], (1, 0))  # F_t - F_0
    return F.cross_entropy(relative.cumsum(-1), t, reduction="none")


def log_ratio(o: Tensor, t: Tensor, reference: int) -> Tensor:
    """y_t = F_reference - F_t = sum_j ([j <= reference] - [j <= t]) o_j, nats.

    As a sum of the terms between the two levels: no difference of large logits, no (B, B) matrix, and one
    formula whether the reference (pure noise) is the last level or the first.

    o (B, K), any float dtype; t (B,) int64; reference: level index. Returns (B,) float32.
    """
    levels = torch.arange(o.shape[-1], device=o.device)
    sign = (levels <= reference).to(torch.int8) - (levels <= t[:, None]).to(torch.int8)
    return (at_least_float32(o) * sign).sum(-1)


def suffix_table(weight: Tensor, bias: Tensor, reference: int) -> tuple[Tensor, Tensor]:
    """The head as one vector a level: y_t = table[t] . h + offset[t] for o = weight h + bias.

    table[t] = sum_j ([j <= reference] - [j <= t]) weight_j, and offset alike of the bias. With the reference
    last these are the suffix sums over j > t; with the reference first, minus the prefix sums over
    1 <= j <= t. So grad_h y_t = table[t]: a denoiser needs neither the K outputs nor their running sum.
    Summed in float64.

    weight (K, D), bias (K,) float32. Returns table (K, D) and offset (K,) in the dtypes of weight and bias.
    """
    table, offset = weight.double().cumsum(0), bias.double().cumsum(0)
    return (table[reference] - table).to(weight.dtype), (offset[reference] - offset).to(bias.dtype)
