"""Tempered log-likelihood of a class and its gradient in the logits, in one pass.

L = tau1 * sum_i q_i f_i - logsumexp_i(tau2 * f_i). tau1 = tau2 = 1 gives log p(y | x); tau2 = 0 gives the
joint energy f_y up to a constant; in between lie the temperatures of Ma et al. 2023, "Elucidating the design
space of classifier-guided diffusion generation".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels.precision import at_least_float32


def softmax_gradient(
    logits: Tensor, target: Tensor, tau1: float = 1.0, tau2: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Value L and cotangent dL/df = tau1 * q - tau2 * softmax(tau2 * f).

    The cotangent seeds a classifier's backward pass (`grad_outputs`), with no autograd through the loss.

    logits f (B, K), any float dtype; target: (B,) int64 classes or (B, K) soft labels q. Returns value (B,)
    in nats and cotangent (B, K), both float32 (float64 stays).
    """
    f = at_least_float32(logits)
    q = (target if target.ndim == 2 else F.one_hot(target, f.shape[-1])).to(f.dtype)
    tempered = tau2 * f
    value = tau1 * (q * f).sum(-1) - torch.logsumexp(tempered, -1)
    return value, tau1 * q - tau2 * torch.softmax(tempered, -1)
