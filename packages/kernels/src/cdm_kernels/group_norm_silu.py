"""Group normalisation, an optional scale and shift per image and channel, and SiLU.

With x^ = (x - mu) r over a group, h = w x^ + b and y = silu(h); P(z) = r (z - mean z - x^ mean(z x^)) is the
derivative of x^, its own adjoint. Backward: q = dy silu'(h), dx = P(w q), dw = sum q x^, db = sum q. For
cotangents v, alpha, beta of those, u = P(v), m = w u + alpha x^ + beta, e = dy m silu''(h), a = w q:

    ddy = m silu'(h)    dw = sum (q u + e x^)    db = sum e
    dx = P(w e + alpha q) - r^2 [A (v - mean v) + V (a - mean a) + x^ (C - 3 V A)]
    A = mean(a x^), V = mean(v x^), C = mean(v a) - mean v mean a

PyTorch differentiates a composite of some twenty pointwise passes instead, over and over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels.dispatch import define, dense, has_kernel, in_first_order, kernels, traced
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

    x (B, C, *spatial), any float dtype, contiguous or channels last without a copy; weight, bias (C,); scale,
    shift (B, C) or None: adaptive normalisation; activation False: no SiLU. Statistics and arithmetic in
    float32 (float64 stays) under any autocast, result in x's dtype and layout. Right in first and second
    order; a third derivative raises.
    """
    if in_first_order() and _small(x) and scale is None and shift is None and weight.dtype == x.dtype:
        h = torch.group_norm(x, groups, weight, bias, eps)  # `reference`, in no time: it takes some 20 us
        return F.silu(h) if activation else h
    if not has_kernel(x) or not x.numel() or (in_first_order() and _small(x)):
        return reference(x, groups, weight, bias, eps, scale, shift, activation)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weight.dtype != accumulator or bias.dtype != accumulator:
        weight, bias = weight.to(accumulator), bias.to(accumulator)
    if scale is not None:
        gain = 1 + scale.to(accumulator)
        weight, bias = weight * gain, bias * gain
    if shift is not None:
        # The kernels want both per image, or both per channel.
        weight, bias = weight.expand(len(x), -1), bias + shift.to(accumulator)
    _check(x, groups, weight, bias)
    if traced(x, weight, bias):
        return _forward(x, weight, bias, groups, eps, activation)[0]
    if not torch.is_grad_enabled():
        return kernels(x, "group_norm_silu").forward(x, weight, bias, groups, eps, activation)[0]
    return _Forward.apply(x, weight, bias, groups, eps, activation)


def _small(x: Tensor) -> bool:
    """Whether PyTorch's own first derivative is cheaper: its fixed cost is lower, on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() < 100_000


def _check(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> None:
    """The kernels read memory as they are told: ValueError where that would not be x, weight or bias."""
    channels, shape = x.shape[1], weight.shape
    if channels % groups or shape != bias.shape or (shape != (channels,) and shape != x.shape[:2]):
        raise ValueError(
            f"x {tuple(x.shape)} with weight {tuple(shape)}, bias {tuple(bias.shape)} in {groups} groups"
        )
    if not x.device == weight.device == bias.device:
        raise ValueError(f"x on {x.device}, weight on {weight.device}, bias on {bias.device}")


def reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """`group_norm_silu` in plain PyTorch."""
    h = at_least_float32(x)
    h = torch.group_norm(h, groups, weight.to(h.dtype), bias.to(h.dtype), eps)
    per_channel = (*x.shape[:2], *(1,) * (x.ndim - 2))
    if scale is not None:
        h = h * (1 + scale.view(per_channel))
    if shift is not None:
        h = h + shift.view(per_channel)
    return (F.silu(h) if activation else h).to(x.dtype)


def _no_third_derivative(ctx: Any, *gradients: Tensor) -> Any:
    raise RuntimeError("group_norm_silu has no third derivative")


# -- in eager ------------------------------------------------------------------------------------------------


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: bool
    ) -> Any:
        y, mean, rstd = kernels(x, "group_norm_silu").forward(x, weight, bias, groups, eps, activation)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.settings = groups, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        backward = _Backward.apply if torch.is_grad_enabled() else kernels(x, "group_norm_silu").backward
        return *backward(dy, x, mean, rstd, weight, bias, *ctx.settings), None, None, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, *rest: Any) -> Any:
        ctx.save_for_backward(dy, x, *rest[:4])
        ctx.settings = rest[4:]
        ctx.set_materialize_grads(False)
        return kernels(x, "group_norm_silu").backward(dy, x, *rest)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, alpha: Tensor | None, beta: Tensor | None) -> Any:
        dy, x, *rest = ctx.saved_tensors
        v = torch.zeros_like(x) if v is None else v
        kernel = kernels(x, "group_norm_silu").double_backward
        double_backward = _DoubleBackward.apply if torch.is_grad_enabled() else kernel
        ddy, dx, dweight, dbias = double_backward(v, alpha, beta, dy, x, *rest, *ctx.settings)
        return ddy, dx, None, None, dweight, dbias, None, None


class _DoubleBackward(torch.autograd.Function):
    """Its backward raises; `once_differentiable` would in `Tensor.backward`, but not in `autograd.grad`."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, *rest: Any) -> Any:
        return kernels(v, "group_norm_silu").double_backward(v, *rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _no_third_derivative(ctx, *gradients)


# -- where a compiler looks on -------------------------------------------------------------------------------


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: bool) -> Any:
    statistics = (weight.new_empty(x.shape[0], groups) for _ in range(2))
    return (torch.empty_like(dense(x)[0]), *statistics)


def _fake_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *rest: Any) -> Any:
    return torch.empty_like(dense(x)[0]), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _fake_double_backward(v: Tensor, alpha: Any, beta: Any, dy: Tensor, x: Tensor, *rest: Any) -> Any:
    return torch.empty_like(dense(x)[0]), *_fake_backward(dy, x, *rest)


def _save_forward(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, groups, _, activation = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.settings = groups, activation
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_forward(ctx: Any, dy: Tensor, *unused: Any) -> Any:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    return *_backward(dy, x, mean, rstd, weight, bias, *ctx.settings), None, None, None


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _differentiate_backward(ctx: Any, v: Tensor, alpha: Tensor, beta: Tensor) -> Any:
    ddy, dx, dweight, dbias = _double_backward(v, alpha, beta, *ctx.saved_tensors, *ctx.settings)
    return ddy, dx, None, None, dweight, dbias, None, None


_double_backward = define(
    "group_norm_silu_double_backward(Tensor v, Tensor? alpha, Tensor? beta, Tensor dy, Tensor x, "
    "Tensor mean, Tensor rstd, Tensor weight, Tensor bias, int groups, bool activation) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "group_norm_silu",
    "double_backward",
    _fake_double_backward,
    _no_third_derivative,
)
_backward = define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "
    "int groups, bool activation) -> (Tensor, Tensor, Tensor)",
    "group_norm_silu",
    "backward",
    _fake_backward,
    _differentiate_backward,
    _save_backward,
)
_forward = define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool activation) "
    "-> (Tensor, Tensor, Tensor)",
    "group_norm_silu",
    "forward",
    _fake_forward,
    _differentiate_forward,
    _save_forward,
)
