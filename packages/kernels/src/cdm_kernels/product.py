"""A matrix product in its operands' own precision, in every order.

`torch.autocast(enabled=False)` around a product keeps its value, not its derivatives: the gradient inside a
training step is taken with autocast on, and there the products of the backward pass are rounded to bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cdm_kernels.dispatch import define_composite, leaf_free, traced, wanted


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices (N, K) and (K, M) of one dtype; whatever autocast says, and in all derivatives."""
    if torch._C._are_functorch_transforms_active():
        return reference(a, b)
    return _product(a, b) if traced(a, b) else _eager(leaf_free(a), leaf_free(b))


def reference(a: Tensor, b: Tensor) -> Tensor:
    """`product` by PyTorch's own derivatives, which heed autocast."""
    device = a.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return a @ b
    return a @ b


# -- in eager ------------------------------------------------------------------------------------------------


def _eager(a: Tensor, b: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Product.apply(a, b)
    return reference(a, b)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return reference(a, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        a, b = ctx.saved_tensors
        mask = wanted(ctx, range(2))
        return _eager(dy, b.T) if mask[0] else None, _eager(a.T, dy) if mask[1] else None


# -- where a compiler looks on -------------------------------------------------------------------------------


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Any:
    a, b = ctx.saved_tensors
    da = _product(dy, b.T) if ctx.needs_input_grad[0] else None
    return da, _product(a.T, dy) if ctx.needs_input_grad[1] else None


_product = define_composite("product(Tensor a, Tensor b) -> Tensor", reference, _differentiate, _save)
