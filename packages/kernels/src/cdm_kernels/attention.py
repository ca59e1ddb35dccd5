"""Self-attention of one head over the pixels of an image, as denoising U-Nets have it.

With queries, keys and values q, k, v (pixels, C) and s = 1 / sqrt(C): P = softmax(s q k^T) by rows, y = P v.
Let (z)_P = P (z - rowsum(P z)), elementwise, the derivative of the softmax and its own adjoint. Backward:

    dP = dy v^T    G = (dP)_P    dq = s G k    dk = s G^T q    dv = P^T dy

For cotangents a, b, c of dq, dk, dv: T = s (a k^T + q b^T), t = rowsum(P T), L = (T)_P and

    H = (T (dP - rowsum(P dP)) - t dP + dy c^T)_P
    ddy = L v + P c    dq = s (H k + G b)    dk = s (H^T q + G^T a)    dv = L^T dy

Fused attention has no second derivative in PyTorch; its other way is a dozen batched products of small
matrices, each through memory. Here an image's matrices stay in the cache, and P alone is kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cdm_kernels.dispatch import channels_last, define, dense, has_kernel, kernels, traced


def attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v by rows, q, k and v being the thirds of qkv's channels.

    qkv (B, 3 C, *spatial), any float dtype, contiguous or channels last without a copy; (B, C, *spatial) in
    that dtype and layout. Arithmetic in float32 (float64 stays) where an image is small enough to gain by it.
    Right in first and second order; a third derivative raises.
    """
    if qkv.shape[1] % 3:
        raise ValueError(f"qkv {tuple(qkv.shape)}: queries, keys and values must be alike wide")
    if not has_kernel(qkv, triton=False) or not qkv.numel() or _large(qkv):
        return reference(qkv)
    if traced(qkv):
        return _forward(qkv)[0]
    if not torch.is_grad_enabled() or not qkv.requires_grad:
        return kernels(qkv, "attention").forward(qkv)[0]
    return _Forward.apply(qkv)


def _large(qkv: Tensor) -> bool:
    """Whether products in bfloat16, twice as fast as those in float32, outweigh the passes through memory."""
    return qkv.dtype == torch.bfloat16 and qkv.shape[1:].numel() > 3 * 16384


def reference(qkv: Tensor) -> Tensor:
    """`attention` in plain PyTorch, in the precision of qkv or of autocast."""
    q, k, v = (part.flatten(2).mT for part in qkv.chunk(3, 1))  # (B, pixels, C)
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[2]), -1)  # (B, query, key)
    return (weights @ v).mT.unflatten(2, qkv.shape[2:])


def _no_third_derivative(ctx: Any, *gradients: Tensor) -> Any:
    raise RuntimeError("attention has no third derivative")


# -- in eager ------------------------------------------------------------------------------------------------


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        y, weights = kernels(qkv, "attention").forward(qkv)
        ctx.save_for_backward(qkv, weights)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        backward = _Backward.apply if torch.is_grad_enabled() else kernels(dy, "attention").backward
        return backward(dy, *ctx.saved_tensors)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, qkv: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(dy, qkv, weights)
        return kernels(qkv, "attention").backward(dy, qkv, weights)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        kernel = kernels(cotangent, "attention").double_backward
        double_backward = _DoubleBackward.apply if torch.is_grad_enabled() else kernel
        return *double_backward(cotangent, *ctx.saved_tensors), None


class _DoubleBackward(torch.autograd.Function):
    """Its backward raises; `once_differentiable` would in `Tensor.backward`, but not in `autograd.grad`."""

    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, *rest: Tensor) -> Any:
        return kernels(cotangent, "attention").double_backward(cotangent, *rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _no_third_derivative(ctx, *gradients)


# -- where a compiler looks on -------------------------------------------------------------------------------


def _fake_values(qkv: Tensor) -> Tensor:
    dense_qkv, is_channels_last = dense(qkv)
    layout = channels_last(qkv.ndim) if is_channels_last else torch.contiguous_format
    shape = (qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:])
    return torch.empty(shape, dtype=qkv.dtype, device=dense_qkv.device, memory_format=layout)


def _fake_forward(qkv: Tensor) -> Any:
    pixels = qkv.shape[2:].numel()
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    return _fake_values(qkv), qkv.new_empty(qkv.shape[0], pixels, pixels, dtype=dtype)


def _fake_backward(dy: Tensor, qkv: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(dense(qkv)[0])


def _fake_double_backward(cotangent: Tensor, dy: Tensor, qkv: Tensor, weights: Tensor) -> Any:
    return _fake_values(qkv), torch.empty_like(dense(qkv)[0])


def _save_forward(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_forward(ctx: Any, dy: Tensor, unused: Any) -> Any:
    return _backward(dy, *ctx.saved_tensors)


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_backward(ctx: Any, cotangent: Tensor) -> Any:
    return *_double_backward(cotangent, *ctx.saved_tensors), None


_double_backward = define(
    "attention_double_backward(Tensor cotangent, Tensor dy, Tensor qkv, Tensor weights) -> (Tensor, Tensor)",
    "attention",
    "double_backward",
    _fake_double_backward,
    _no_third_derivative,
    devices=("CPU",),
)
_backward = define(
    "attention_backward(Tensor dy, Tensor qkv, Tensor weights) -> Tensor",
    "attention",
    "backward",
    _fake_backward,
    _differentiate_backward,
    _save_backward,
    devices=("CPU",),
)
_forward = define(
    "attention(Tensor qkv) -> (Tensor, Tensor)",
    "attention",
    "forward",
    _fake_forward,
    _differentiate_forward,
    _save_forward,
    devices=("CPU",),
)
