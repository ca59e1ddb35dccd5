"""Head of a noise-level classifier: cumulative logits, their cross-entropy, and the log-ratio of two levels.

A classifier of K noise levels puts out o (B, K), the log-ratios of adjacent levels; its logits are the
running sums F_t = sum_{j <= t} o_j (Yadin, Elata, Michaeli 2024, "Classification Diffusion Models"). o_0 is
common to all logits: it cancels in every probability and every ratio, so the loss and the ratios drop it and
its gradient is exactly zero. Logits reach 1e4 nats: everything here is float32 or better.

With p = softmax(F), S_j = sum_{k >= j} p_k and the reference level r, the derivatives of

    cross-entropy = logsumexp(F) - F_t       log-ratio = F_r - F_t

along cotangents g and h are do_j = g (S_j - [j <= t]) + h ([j <= r] - [j <= t]): every row of the head learns
from every image. For a cotangent v of do (v_0 dropped), c its running sum:

    dg = <p, c> - c_t    dh = c_r - c_t    do_j = g sum_{k >= j} p_k (c_k - <p, c>)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_kernels.dispatch import define, has_kernel, kernels, traced
from cdm_kernels.precision import at_least_float32


class NoiseLevelHead(NamedTuple):
    """Per row, (B,): -log p(t | x) and F_reference - F_t, nats, float32 (float64 stays); argmax F, int64."""

    cross_entropy: Tensor
    log_ratio: Tensor
    estimate: Tensor


def cumulative_logits(o: Tensor) -> Tensor:
    """F_t = sum_{j <= t} o_j; (B, K) of any float dtype -> (B, K) float32 (float64 stays)."""
    return at_least_float32(o).cumsum(-1)


def noise_level_head(o: Tensor, t: Tensor, reference: int) -> NoiseLevelHead:
    """Cross-entropy at t, log-ratio of `reference` to t, and the likeliest level (the first of equals).

    o (B, K) adjacent log-ratios, any float dtype; t (B,) int64 level indices; reference: level index. In one
    reading of o, and one a derivative; right in first and second order; a third derivative raises.
    """
    if t.dtype != torch.int64 or t.shape != o.shape[:1]:
        raise ValueError(f"t must be ({o.shape[0]},) int64, not {tuple(t.shape)} {t.dtype}")
    if t.device != o.device:
        raise ValueError(f"o on {o.device}, t on {t.device}: they must be on one device")
    if not 0 <= reference < o.shape[1]:
        raise IndexError(f"reference must be one of {o.shape[1]} levels, not {reference}")
    if not has_kernel(o):
        return _reference(o, t, reference)
    if traced(o, t):
        return NoiseLevelHead(*_forward(o, t, reference)[:3])
    if not (o.requires_grad and torch.is_grad_enabled()):
        return NoiseLevelHead(*kernels(o, "head").forward(o, t, reference)[:3])
    return NoiseLevelHead(*_Forward.apply(o, t, reference))


def noise_level_cross_entropy(o: Tensor, t: Tensor) -> Tensor:
    """-log p(t | x) = logsumexp(F) - F_t, nats; o_0 has no part in it, so its gradient is 0 exactly.

    o (B, K) adjacent log-ratios, any float dtype; t (B,) int64 level indices. Returns (B,) float32.
    """
    fits = o.is_cpu and t.is_cpu and t.dtype == torch.int64 and t.shape == o.shape[:1] and o.shape[1] > 0
    if fits and has_kernel(o, triton=False) and not traced(o, t):
        if o.requires_grad and torch.is_grad_enabled():
            return _CrossEntropy.apply(o, t)
        return kernels(o, "head").cross_entropy(o, t)
    return noise_level_head(o, t, 0).cross_entropy


def log_ratio(o: Tensor, t: Tensor, reference: int) -> Tensor:
    """y_t = F_reference - F_t = sum_j ([j <= reference] - [j <= t]) o_j, nats.

    o (B, K), any float dtype; t (B,) int64; reference: level index, the last (pure noise) or any other.
    Returns (B,) float32.
    """
    return noise_level_head(o, t, reference).log_ratio


def reference(o: Tensor, t: Tensor, reference: int) -> NoiseLevelHead:
    """`noise_level_head` in plain PyTorch.

    The log-ratio is a sum of the terms between the two levels: no difference of large logits, no (B, B)
    matrix, and one formula whether the reference is the last level or the first.
    """
    o = at_least_float32(o)
    relative = F.pad(o[:, 1:], (1, 0)).cumsum(-1)  # F_t - F_0
    cross_entropy = F.cross_entropy(relative, t, reduction="none")
    levels = torch.arange(o.shape[-1], device=o.device)
    sign = (levels <= reference).to(torch.int8) - (levels <= t[:, None]).to(torch.int8)
    return NoiseLevelHead(cross_entropy, (o * sign).sum(-1), relative.argmax(-1))


_reference = reference  # by a name that no argument has


def _no_third_derivative(ctx: Any, *gradients: Tensor) -> Any:
    raise RuntimeError("noise_level_head has no third derivative")


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


# -- in eager ------------------------------------------------------------------------------------------------


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, t: Tensor, reference: int) -> Any:
        *values, summary = kernels(o, "head").forward(o, t, reference)
        ctx.save_for_backward(o, t, summary)
        ctx.reference = reference
        ctx.mark_non_differentiable(values[2])
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None, _: None) -> Any:
        o, t, summary = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return kernels(o, "head").backward(g, h, o, t, summary, ctx.reference), None, None
        # The log-ratio is linear: its gradient is not a function of o.
        o = o.detach() if g is None else o
        return _Backward.apply(g, h, o, t, summary, ctx.reference), None, None


class _CrossEntropy(torch.autograd.Function):
    """`_Forward` without what the loss alone has no use for, on a CPU: a tenth of a small call."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, t: Tensor) -> Tensor:
        module = kernels(o, "head")
        summary = module.new_summary(o)
        ctx.save_for_backward(o, t, summary)
        return module.cross_entropy(o, t, summary)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        o, t, summary = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return kernels(o, "head").backward(g, None, o, t, summary, 0), None
        return _Backward.apply(g, None, o, t, summary, 0), None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor | None, h: Tensor | None, o: Tensor, *rest: Any) -> Any:
        ctx.save_for_backward(g, o, *rest[:2])
        ctx.reference = rest[2]
        ctx.given = g is not None, h is not None
        return kernels(o, "head").backward(g, h, o, *rest)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        dg, dh, do = _DoubleBackward.apply(v, *ctx.saved_tensors, ctx.reference)
        return dg if ctx.given[0] else None, dh if ctx.given[1] else None, do, None, None, None


class _DoubleBackward(torch.autograd.Function):
    """Its backward raises; `once_differentiable` would not where v is constant."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor | None, o: Tensor, *rest: Any) -> Any:
        return kernels(o, "head").double_backward(v, g, o, *rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _no_third_derivative(ctx, *gradients)


# -- where a compiler looks on -------------------------------------------------------------------------------


def _fake_forward(o: Tensor, t: Tensor, reference: int) -> Any:
    dtype = torch.promote_types(o.dtype, torch.float32)
    new = lambda *shape: o.new_empty(len(o), *shape, dtype=dtype)  # noqa: E731
    return new(), new(), t.new_empty(len(o)), new(3)


def _fake_backward(g: Any, h: Any, o: Tensor, *rest: Any) -> Tensor:
    return o.new_empty(o.shape)


def _fake_double_backward(v: Tensor, g: Any, o: Tensor, t: Tensor, summary: Tensor, reference: int) -> Any:
    return summary.new_empty(len(o)), summary.new_empty(len(o)), o.new_empty(o.shape)


def _save_forward(ctx: Any, inputs: Any, output: Any) -> None:
    o, t, ctx.reference = inputs
    ctx.save_for_backward(o, t, output[3])
    ctx.mark_non_differentiable(*output[2:])


def _differentiate_forward(ctx: Any, g: Tensor, h: Tensor, *unused: Any) -> Any:
    return _backward(g, h, *ctx.saved_tensors, ctx.reference), None, None


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    g, h, o, t, summary, ctx.reference = inputs
    ctx.save_for_backward(g, o, t, summary)
    ctx.given = g is not None, h is not None


def _differentiate_backward(ctx: Any, v: Tensor) -> Any:
    dg, dh, do = _double_backward(v, *ctx.saved_tensors, ctx.reference)
    return dg if ctx.given[0] else None, dh if ctx.given[1] else None, do, None, None, None


_double_backward = define(
    "noise_level_head_double_backward(Tensor v, Tensor? g, Tensor o, Tensor t, Tensor summary, "
    "int reference) -> (Tensor, Tensor, Tensor)",
    "head",
    "double_backward",
    _fake_double_backward,
    _no_third_derivative,
)
_backward = define(
    "noise_level_head_backward(Tensor? g, Tensor? h, Tensor o, Tensor t, Tensor summary, int reference) "
    "-> Tensor",
    "head",
    "backward",
    _fake_backward,
    _differentiate_backward,
    _save_backward,
)
_forward = define(
    "noise_level_head(Tensor o, Tensor t, int reference) -> (Tensor, Tensor, Tensor, Tensor)",
    "head",
    "forward",
    _fake_forward,
    _differentiate_forward,
    _save_forward,
)
