"""Tempered log-likelihood of a class and its gradient in the logits, in one pass.

L = tau1 * sum_i q_i f_i - logsumexp_i(tau2 * f_i). tau1 = tau2 = 1 gives log p(y | x); tau2 = 0 gives the
joint energy f_y up to a constant; in between lie the temperatures of Ma et al. 2023, "Elucidating the design
space of classifier-guided diffusion generation".

With p = softmax(tau2 f), <x> = sum_i p_i x_i and x' = x - <x>, along cotangents a of L and b of dL/df:

    df = a (tau1 q - tau2 p) - tau2^2 p b'

and for a cotangent u of df, the last term being the third cumulant of p:

    da = tau1 sum q u - tau2 <u>    db = -tau2^2 p u'    df = -tau2^2 p (a u' + tau2 (b' u' - <b' u'>))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels.dispatch import define, has_kernel, kernels, traced
from cdm_kernels.precision import at_least_float32


def softmax_gradient(
    logits: Tensor, target: Tensor, tau1: float = 1.0, tau2: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Value L and cotangent dL/df = tau1 * q - tau2 * softmax(tau2 * f).

    The cotangent seeds a classifier's backward pass (`grad_outputs`), with no autograd through the loss. Both
    are right in first and second order in the logits; a third derivative raises, and labels have none.

    logits f (B, K), any float dtype; target: (B,) int64 classes or (B, K) soft labels q. Returns value (B,)
    in nats and cotangent (B, K), both float32 (float64 stays).
    """
    if target.device != logits.device:
        raise ValueError(f"logits on {logits.device}, target on {target.device}: they must be on one device")
    if target.dtype == torch.int64:
        if target.shape != logits.shape[:1]:
            raise ValueError(f"classes must be ({len(logits)},), not {tuple(target.shape)}")
    elif target.shape != logits.shape or not target.is_floating_point():
        raise ValueError(f"target must be int64 classes or soft labels, not {target.dtype} {target.shape}")
    elif target.requires_grad:
        raise ValueError("softmax_gradient has no derivative in its soft labels: detach them")
    else:
        target = target.to(torch.promote_types(logits.dtype, torch.float32))
    tau1, tau2 = float(tau1), float(tau2)  # an integer would be a kernel of its own
    if not has_kernel(logits):
        return reference(logits, target, tau1, tau2)
    if traced(logits, target):
        return _forward(logits, target, tau1, tau2)[:2]
    return _Forward.apply(logits, target, tau1, tau2)


def reference(logits: Tensor, target: Tensor, tau1: float = 1.0, tau2: float = 1.0) -> tuple[Tensor, Tensor]:
    """`softmax_gradient` in plain PyTorch."""
    f = at_least_float32(logits)
    q = (target if target.ndim == 2 else F.one_hot(target, f.shape[-1])).to(f.dtype)
    tempered = tau2 * f
    energy = (q * f).sum(-1) if target.ndim == 2 else f.gather(1, target[:, None])[:, 0]
    return tau1 * energy - torch.logsumexp(tempered, -1), tau1 * q - tau2 * torch.softmax(tempered, -1)


def _no_third_derivative(ctx: Any, *gradients: Tensor) -> Any:
    raise RuntimeError("softmax_gradient has no third derivative")


# -- in eager ------------------------------------------------------------------------------------------------


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, target: Tensor, tau1: float, tau2: float) -> Any:
        value, cotangent, statistics = kernels(f, "softmax_gradient").forward(f, target, tau1, tau2)
        ctx.save_for_backward(f, target, statistics)
        ctx.settings = tau1, tau2
        ctx.set_materialize_grads(False)
        return value, cotangent

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> Any:
        f, target, statistics = ctx.saved_tensors
        rest = (target, statistics, *ctx.settings)
        if not torch.is_grad_enabled():
            return kernels(f, "softmax_gradient").backward(a, b, f, *rest), None, None, None
        return _Backward.apply(a, b, f, *rest), None, None, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor | None, b: Tensor | None, f: Tensor, *rest: Any) -> Any:
        ctx.save_for_backward(a, b, f, *rest[:2])
        ctx.settings = rest[2:]
        return kernels(f, "softmax_gradient").backward(a, b, f, *rest)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        a, b = ctx.saved_tensors[:2]
        da, db, df = _DoubleBackward.apply(u, *ctx.saved_tensors, *ctx.settings)
        return None if a is None else da, None if b is None else db, df, None, None, None, None


class _DoubleBackward(torch.autograd.Function):
    """Its backward raises; `once_differentiable` would not where u is constant."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, *rest: Any) -> Any:
        return kernels(f, "softmax_gradient").double_backward(u, a, b, f, *rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _no_third_derivative(ctx, *gradients)


# -- where a compiler looks on -------------------------------------------------------------------------------


def _fake_forward(f: Tensor, target: Tensor, tau1: float, tau2: float) -> Any:
    dtype = torch.promote_types(f.dtype, torch.float32)
    return tuple(f.new_empty(len(f), *shape, dtype=dtype) for shape in ((), (f.shape[1],), (2,)))


def _fake_backward(a: Any, b: Any, f: Tensor, *rest: Any) -> Tensor:
    return f.new_empty(f.shape)


def _fake_double_backward(
    u: Tensor, a: Any, b: Any, f: Tensor, target: Tensor, statistics: Tensor, tau1: float, tau2: float
) -> Any:
    return statistics.new_empty(len(f)), statistics.new_empty(f.shape), f.new_empty(f.shape)


def _save_forward(ctx: Any, inputs: Any, output: Any) -> None:
    f, target, *ctx.settings = inputs
    ctx.save_for_backward(f, target, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate_forward(ctx: Any, a: Tensor, b: Tensor, _: Any) -> Any:
    return _backward(a, b, *ctx.saved_tensors, *ctx.settings), None, None, None


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _differentiate_backward(ctx: Any, u: Tensor) -> Any:
    a, b = ctx.saved_tensors[:2]
    da, db, df = _double_backward(u, *ctx.saved_tensors, *ctx.settings)
    return None if a is None else da, None if b is None else db, df, None, None, None, None


_double_backward = define(
    "softmax_gradient_double_backward(Tensor u, Tensor? a, Tensor? b, Tensor f, Tensor target, "
    "Tensor statistics, float tau1, float tau2) -> (Tensor, Tensor, Tensor)",
    "softmax_gradient",
    "double_backward",
    _fake_double_backward,
    _no_third_derivative,
)
_backward = define(
    "softmax_gradient_backward(Tensor? a, Tensor? b, Tensor f, Tensor target, Tensor statistics, "
    "float tau1, float tau2) -> Tensor",
    "softmax_gradient",
    "backward",
    _fake_backward,
    _differentiate_backward,
    _save_backward,
)
_forward = define(
    "softmax_gradient(Tensor f, Tensor target, float tau1, float tau2) -> (Tensor, Tensor, Tensor)",
    "softmax_gradient",
    "forward",
    _fake_forward,
    _differentiate_forward,
    _save_forward,
)
